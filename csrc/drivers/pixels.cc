// 1x1 convolutions with pixels in the lanes: channel planes go in, channel planes come out, and
// nothing is transposed on the way.
//
//   for each strip of pixels: round it to dwords of 2 or 4 channels         parallel
//   for each task (a chunk of channel blocks x a range of strips):          parallel
//     expand the codes of the chunk                                         once per task
//     for each strip, each block of 16 channels: gemm_pixels
//
// A strip is as long as stays in L1, and long enough for outputs to be written in long runs.
#include <algorithm>

#include "core/scratch.h"
#include "drivers/conv.h"

namespace afpq {
namespace {

constexpr size_t kStripBytes = size_t{32} << 10;
constexpr size_t kLeastPixels = 64, kMostPixels = 512;
constexpr size_t kLanePixels = 16;                    // kernels.h: strips are multiples of it
constexpr size_t kLeastLanes = 8;                     // fewer pixels are rows
constexpr size_t kExpandedBytes = size_t{128} << 10;  // of a chunk, in L2
constexpr size_t kTargetTasks = 8;
constexpr size_t kTaskElements = size_t{1} << 15;

size_t round_up(size_t value, size_t multiple) { return ceil_div(value, multiple) * multiple; }

struct Strips {
  size_t pixels;  // of one, less at the end
  size_t count;
  size_t bytes;  // of one
};

Strips strips_of(size_t num_pixels, size_t pixel_bytes) {
  const size_t most = std::clamp(kStripBytes / pixel_bytes, kLeastPixels, kMostPixels);
  Strips strips;
  strips.count = ceil_div(num_pixels, most);
  strips.pixels = round_up(ceil_div(num_pixels, strips.count), kLanePixels);
  strips.count = ceil_div(num_pixels, strips.pixels);
  strips.bytes = strips.pixels * pixel_bytes;
  return strips;
}

void quantize_strips(const Conv& op, const ConvShape& shape, const Products& products,
                     const Strips& strips, const RowQuantizer& quantizer, const float* src,
                     uint8_t* dst, const Parallel& parallel) {
  const auto run = products.elements == Elements::kWords ? op.kernels->quantize_pixels_s16_f32
                                                         : op.kernels->quantize_pixels_u8_f32;
  const size_t pixels = shape.num_in();
  const size_t step = std::max<size_t>(1, kTaskElements / (strips.pixels * shape.channels_in));
  parallel_for(parallel, ceil_div(strips.count, step), [&](size_t task) {
    for (size_t s = task * step; s < std::min(strips.count, (task + 1) * step); ++s) {
      AfpqQuantize quantize = quantizer.quantize;
      quantize.planes[0] = dst + s * strips.bytes;
      quantize.words = reinterpret_cast<int16_t*>(quantize.planes[0]);
      const size_t first = s * strips.pixels;
      run(src + first, pixels, shape.channels_in, std::min(strips.pixels, pixels - first),
          strips.pixels, &quantize);
    }
  });
}

// A channel block's part of a product; `rhs` is expanded.
AfpqPixels product_of(const Conv& op, const ConvShape& shape, const Products& products,
                      const RowQuantizer& quantizer, size_t block, const uint8_t* rhs) {
  static constexpr float kNoBias[kTileN] = {};
  const PackedWeight& weight = *op.weight;
  const size_t channel = block * kTileN;
  const bool joined = weight.format.num_planes() > 1;
  AfpqPixels args = {};
  args.rhs = rhs;
  args.num_tiles = weight.num_tiles;
  args.num_channels = std::min<size_t>(kTileN, shape.channels_out - channel);
  args.limit = weight.limits[0];
  args.zero_point = quantizer.zero_element(products.elements);
  args.column_sums = (joined ? weight.joined_sums : weight.column_sums[0]).data() + channel;
  args.scales = weight.scales.data() + channel;
  args.bias = op.bias ? op.bias + channel : kNoBias;
  args.row_scale = quantizer.scale;
  args.low = op.low;
  args.high = op.high;
  args.channel_stride = shape.num_out();
  return args;
}

void expand_block(const Conv& op, const Products& products, size_t block, uint8_t* dst) {
  const PackedWeight& weight = *op.weight;
  const unsigned bits = weight.format.bits();
  if (products.elements == Elements::kWords) {
    op.kernels->expand_s16_afp(weight.block(block), weight.num_tiles, bits, weight.tables.joined,
                               reinterpret_cast<int16_t*>(dst));
  } else {
    op.kernels->expand_s8_afp(weight.block(block), weight.num_tiles, bits, weight.tables.low,
                              reinterpret_cast<int8_t*>(dst));
  }
}

void multiply_strips(const Conv& op, const ConvShape& shape, const Products& products,
                     const Strips& strips, const RowQuantizer& quantizer, const uint8_t* lhs,
                     float* dst, const Parallel& parallel) {
  const size_t blocks = op.weight->num_blocks, pixels = shape.num_out();
  const size_t block_bytes = op.weight->num_tiles * kTileCodes * products.element_bytes();
  const size_t chunk = std::max<size_t>(
      1, std::min({blocks, kExpandedBytes / block_bytes, blocks * strips.count / kTargetTasks}));
  const size_t chunks = ceil_div(blocks, chunk);
  const size_t splits = std::min(strips.count, std::max<size_t>(1, kTargetTasks / chunks));
  const size_t step = ceil_div(strips.count, splits);
  parallel_for(parallel, chunks * ceil_div(strips.count, step), [&](size_t task) {
    const size_t first = task % chunks * chunk, last = std::min(first + chunk, blocks);
    Scratch& scratch = task_scratch();
    scratch.reset(Scratch::room<uint8_t>(chunk * block_bytes));
    uint8_t* expanded = scratch.take<uint8_t>(chunk * block_bytes);
    for (size_t b = first; b < last; ++b)
      expand_block(op, products, b, expanded + (b - first) * block_bytes);
    const size_t strip = task / chunks * step;
    for (size_t s = strip; s < std::min(strip + step, strips.count); ++s) {
      for (size_t b = first; b < last; ++b) {
        AfpqPixels args =
            product_of(op, shape, products, quantizer, b, expanded + (b - first) * block_bytes);
        args.lhs = lhs + s * strips.bytes;
        args.pixel_stride = strips.pixels;
        args.num_pixels = std::min(strips.pixels, pixels - s * strips.pixels);
        args.dst = dst + b * kTileN * pixels + s * strips.pixels;
        if (products.elements == Elements::kWords) {
          op.kernels->gemm_pixels_f32_s16_s16(&args);
        } else {
          op.kernels->gemm_pixels_f32_u8_s8(&args);
        }
      }
    }
  });
}

}  // namespace

bool conv_fits_pixels(const Conv& op, const ConvShape& shape, const Products& products) {
  return op.kernels->pixel_lanes && products.elements != Elements::kFloats &&
         products.lhs_planes == 1 && products.rhs_planes == 1 && op.weight->segments.size() == 1 &&
         shape.groups == 1 && shape.num_out() >= kLeastLanes &&
         (products.elements == Elements::kWords ||
          op.weight->limits[0] <= op.kernels->a8_byte_limit);
}

void conv_pixels(const Conv& op, const ConvShape& shape, const Products& products, const float* src,
                 size_t batch, float* dst, const Parallel& parallel) {
  const size_t pixels = shape.num_in();
  const Strips strips = strips_of(pixels, shape.channels_in * products.element_bytes());
  layer_scratch().reset(Scratch::room<uint8_t>(strips.count * strips.bytes));
  uint8_t* lhs = layer_scratch().take<uint8_t>(strips.count * strips.bytes);
  for (size_t i = 0; i < batch; ++i) {
    const float* sample = src + i * shape.channels_in * pixels;
    const RowQuantizer quantizer = sample_quantizer(op, shape, sample, parallel);
    quantize_strips(op, shape, products, strips, quantizer, sample, lhs, parallel);
    multiply_strips(op, shape, products, strips, quantizer, lhs,
                    dst + i * shape.channels_out * pixels, parallel);
  }
}

}  // namespace afpq
