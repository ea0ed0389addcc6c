// Convolutions with pixels in the lanes: channel planes go in, channel planes come out, and nothing
// is transposed on the way.
//
//   1x1:   a strip of pixels is rounded to a panel, dwords of 2 or 4 channels       per strip
//   taps:  the sample is rounded to planes of dwords                                parallel
//          the rows that each tap reads are copied to a panel                       per strip
//   many strips: for each strip: make its panel, multiply it by all blocks of 16    parallel
//                channels, which are expanded before
//   few strips:  make all panels, then for each chunk of blocks: expand, multiply   parallel
//
// A panel is as wide as stays in L1, and wide enough for outputs to be written in long runs.
#include <algorithm>
#include <cstring>

#include "core/scratch.h"
#include "drivers/conv_paths.h"

namespace afpq {
namespace {

constexpr size_t kPanelBytes = size_t{128} << 10;
constexpr size_t kLeastPixels = 64, kMostPixels = 512;
constexpr size_t kLanePixels = 16;                    // kernels.h: panels are multiples of it
constexpr size_t kLeastLanes = 8;                     // fewer pixels are rows
constexpr size_t kExpandedBytes = size_t{128} << 10;  // of a chunk, in L2
constexpr size_t kManyStrips = 4;                     // enough for a few threads
constexpr size_t kTargetTasks = 16;
constexpr size_t kTaskElements = size_t{1} << 15;
constexpr size_t kDword = 4;

size_t round_up(size_t value, size_t multiple) { return ceil_div(value, multiple) * multiple; }

// What the steps of a convolution have in common.
struct Job {
  const Conv& op;
  const ConvShape& shape;
  const Products products;
  const bool taps;     // or 1x1
  const size_t steps;  // channels of a dword
  size_t pixels;       // of a strip, less at the end; of taps: whole rows of output
  size_t count;        // strips
  size_t stride;       // dwords of a row of a panel: odd lines, so that a column spreads over L1
  size_t panel_bytes;
  size_t plane_bytes;  // of 16 channels, expanded
  size_t block_bytes;  // of all planes

  Job(const Conv& conv, const ConvShape& conv_shape, const Products& conv_products)
      : op(conv),
        shape(conv_shape),
        products(conv_products),
        taps(conv_shape.num_taps() > 1 || conv_shape.strides[1] > 1 || conv_shape.strides[2] > 1 ||
             conv_shape.num_in() != conv_shape.num_out()),
        steps(kDword / conv_products.element_bytes()) {
    const size_t unit = taps ? shape.out[2] : 1, total = shape.num_out() / unit;
    const size_t most = std::clamp(kPanelBytes / (op.weight->k * products.element_bytes()),
                                   kLeastPixels, kMostPixels);
    const size_t units = std::max<size_t>(1, most / unit);
    count = ceil_div(total, units);
    if (count > 1) count = round_up(count, 2);  // for as many threads
    pixels = ceil_div(total, count) * unit;
    if (!taps) pixels = round_up(pixels, kLanePixels);
    count = ceil_div(shape.num_out(), pixels);
    stride = (round_up(pixels, kLanePixels) / kLanePixels | 1) * kLanePixels;
    panel_bytes = op.weight->k / steps * stride * kDword;
    plane_bytes = op.weight->num_tiles * kTileCodes * products.element_bytes();
    block_bytes = plane_bytes * products.rhs_planes;
  }

  bool words() const { return products.elements == Elements::kWords; }
  size_t pixels_of(size_t strip) const {
    return std::min(pixels, shape.num_out() - strip * pixels);
  }
};

// Pixels [first, first + count) of all channels to dwords of a plane or a panel.
void quantize_pixels(const Job& job, const RowQuantizer& quantizer, const float* src, size_t first,
                     size_t count, size_t stride, uint8_t* dst) {
  AfpqQuantize quantize = quantizer.quantize;
  quantize.planes[0] = dst;
  quantize.words = reinterpret_cast<int16_t*>(dst);
  const auto run = job.words() ? job.op.kernels->quantize_pixels_s16_f32
                               : job.op.kernels->quantize_pixels_u8_f32;
  run(src + first, job.shape.num_in(), job.shape.channels_in, count, stride, &quantize);
}

// A sample as planes of dwords: [channels / steps][num_in].
void quantize_planes(const Job& job, const RowQuantizer& quantizer, const float* src, uint8_t* dst,
                     const Parallel& parallel) {
  const size_t total = job.shape.num_in();
  const size_t step = std::max(kLanePixels, kTaskElements / job.shape.channels_in);
  parallel_for(parallel, ceil_div(total, step), [&](size_t task) {
    const size_t first = task * step;
    quantize_pixels(job, quantizer, src, first, std::min(step, total - first), total,
                    dst + first * kDword);
  });
}

// Outputs [begin, end) of an axis whose tap, `offset` from them times the stride, lies in the
// input.
struct Range {
  size_t begin, end;
  Range(size_t offset, size_t pad, size_t step, size_t in, size_t out) {
    begin = std::min(offset < pad ? ceil_div(pad - offset, step) : 0, out);
    end = in + pad > offset ? std::min((in + pad - offset - 1) / step + 1, out) : 0;
    end = std::max(begin, end);
  }
};

// The rows of a panel that one tap makes, of all channels: `planes` has dwords, as floats because
// the kernel moves floats.
void copy_tap(const Job& job, const float* planes, float padding, size_t ky, size_t kx,
              size_t strip, float* dst) {
  const ConvShape& shape = job.shape;
  const size_t width = shape.out[2], y0 = strip * job.pixels / width;
  const size_t num_rows = job.pixels_of(strip) / width;
  const size_t offset_y = ky * shape.dilations[1], offset_x = kx * shape.dilations[2];
  const Range all(offset_y, shape.pads[1], shape.strides[1], shape.in[1], shape.out[1]);
  const Range x(offset_x, shape.pads[2], shape.strides[2], shape.in[2], width);
  const size_t begin = std::clamp(all.begin, y0, y0 + num_rows) - y0;
  const size_t end = std::max(begin, std::clamp(all.end, y0, y0 + num_rows) - y0);
  const bool some = begin < end && x.begin < x.end;
  const size_t row = (y0 + begin) * shape.strides[1] + offset_y - shape.pads[1];
  const size_t column = x.begin * shape.strides[2] + offset_x - shape.pads[2];
  for (size_t g = 0; g < shape.channels_in / job.steps; ++g, dst += job.stride) {
    if (!some) {
      std::fill(dst, dst + num_rows * width, padding);
      continue;
    }
    std::fill(dst, dst + begin * width, padding);
    std::fill(dst + end * width, dst + num_rows * width, padding);
    if (x.begin > 0 || x.end < width) {
      for (size_t y = begin; y < end; ++y) {
        std::fill(dst + y * width, dst + y * width + x.begin, padding);
        std::fill(dst + y * width + x.end, dst + (y + 1) * width, padding);
      }
    }
    job.op.kernels->pick_f32(planes + g * shape.num_in() + row * shape.in[2] + column,
                             shape.in[2] * shape.strides[1], shape.strides[2], end - begin,
                             x.end - x.begin, width, dst + begin * width + x.begin);
  }
}

// Where panels come from: the floats of a sample, or its planes.
struct Source {
  const float* floats;
  const uint8_t* planes;
  const RowQuantizer& quantizer;
};

void make_panel(const Job& job, const Source& source, size_t strip, uint8_t* panel) {
  if (!job.taps) {
    return quantize_pixels(job, source.quantizer, source.floats, strip * job.pixels,
                           job.pixels_of(strip), job.stride, panel);
  }
  const int32_t zero = source.quantizer.zero_element(job.products.elements);
  const uint32_t dword = job.words() ? static_cast<uint32_t>(zero & 0xffff) * 0x10001u
                                     : static_cast<uint32_t>(zero & 0xff) * 0x1010101u;
  float padding;
  std::memcpy(&padding, &dword, sizeof(padding));
  const size_t tap_dwords = job.shape.channels_in / job.steps * job.stride;
  float* dst = reinterpret_cast<float*>(panel);
  for (size_t ky = 0; ky < job.shape.kernel[1]; ++ky) {
    for (size_t kx = 0; kx < job.shape.kernel[2]; ++kx, dst += tap_dwords) {
      copy_tap(job, reinterpret_cast<const float*>(source.planes), padding, ky, kx, strip, dst);
    }
  }
}

void expand_block(const Job& job, size_t block, uint8_t* dst) {
  const PackedWeight& weight = *job.op.weight;
  const unsigned bits = weight.format.bits();
  const FormatTables& tables = weight.tables;
  if (!job.words()) {
    return job.op.kernels->expand_s8_afp(weight.block(block), weight.num_tiles, bits, tables.low,
                                         reinterpret_cast<int8_t*>(dst));
  }
  for (int q = 0; q < job.products.rhs_planes; ++q, dst += job.plane_bytes) {
    job.op.kernels->expand_s16_afp(weight.block(block), weight.num_tiles, bits,
                                   job.products.rhs_planes == 1 ? tables.joined : tables.words[q],
                                   reinterpret_cast<int16_t*>(dst));
  }
}

// The planes that a sample becomes, and what is added to them, or null.
struct Planes {
  float* floats;
  const float* residual;
};

// A panel times a block of channels. dst: the planes of the sample.
void multiply(const Job& job, const RowQuantizer& quantizer, size_t strip, const uint8_t* panel,
              size_t block, const uint8_t* rhs, const Planes& dst) {
  static constexpr float kNoBias[kTileN] = {};
  const PackedWeight& weight = *job.op.weight;
  const size_t channel = block * kTileN;
  const bool joined = weight.format.num_planes() > job.products.rhs_planes;
  AfpqPixels args = {};
  args.lhs = panel;
  args.rhs = rhs;
  if (job.products.rhs_planes == 2) {
    args.rhs_high = rhs + job.plane_bytes;
    args.column_sums_high = weight.column_sums[1].data() + channel;
  }
  args.num_tiles = weight.num_tiles;
  args.pixel_stride = job.stride;
  args.num_pixels = job.pixels_of(strip);
  args.num_channels = std::min<size_t>(kTileN, job.shape.channels_out - channel);
  args.limit = weight.limits[0];
  args.zero_point = quantizer.zero_element(job.products.elements);
  args.column_sums = (joined ? weight.joined_sums : weight.column_sums[0]).data() + channel;
  args.scales = weight.scales.data() + channel;
  args.bias = job.op.bias ? job.op.bias + channel : kNoBias;
  args.row_scale = quantizer.scale;
  // What is added later is clamped later.
  args.low = dst.residual ? -kInfinity : job.op.low;
  args.high = dst.residual ? kInfinity : job.op.high;
  const size_t at = channel * job.shape.num_out() + strip * job.pixels;
  args.dst = dst.floats + at;
  args.channel_stride = job.shape.num_out();
  if (job.words()) {
    job.op.kernels->gemm_pixels_f32_s16_s16(&args);
  } else {
    job.op.kernels->gemm_pixels_f32_u8_s8(&args);
  }
  if (dst.residual) {
    job.op.kernels->add_clamp_f32(dst.residual + at, args.channel_stride, args.num_channels,
                                  args.num_pixels, job.op.low, job.op.high, args.dst);
  }
}

void expand_all(const Job& job, uint8_t* dst, const Parallel& parallel) {
  const size_t blocks = job.op.weight->num_blocks;
  const size_t step = std::max<size_t>(1, kExpandedBytes / job.block_bytes);
  parallel_for(parallel, ceil_div(blocks, step), [&](size_t task) {
    for (size_t b = task * step; b < std::min(blocks, (task + 1) * step); ++b)
      expand_block(job, b, dst + b * job.block_bytes);
  });
}

void run_many_strips(const Job& job, const Source& source, const uint8_t* expanded,
                     const Planes& dst, const Parallel& parallel) {
  parallel_for(parallel, job.count, [&](size_t strip) {
    task_scratch().reset(Scratch::room<uint8_t>(job.panel_bytes));
    uint8_t* panel = task_scratch().take<uint8_t>(job.panel_bytes);
    make_panel(job, source, strip, panel);
    for (size_t b = 0; b < job.op.weight->num_blocks; ++b)
      multiply(job, source.quantizer, strip, panel, b, expanded + b * job.block_bytes, dst);
  });
}

void run_few_strips(const Job& job, const Source& source, uint8_t* panels, const Planes& dst,
                    const Parallel& parallel) {
  const size_t blocks = job.op.weight->num_blocks;
  parallel_for(parallel, job.count, [&](size_t strip) {
    make_panel(job, source, strip, panels + strip * job.panel_bytes);
  });
  const size_t step = std::max<size_t>(
      1, std::min(ceil_div(blocks, kTargetTasks), kExpandedBytes / job.block_bytes));
  parallel_for(parallel, ceil_div(blocks, step), [&](size_t task) {
    task_scratch().reset(Scratch::room<uint8_t>(job.block_bytes));
    uint8_t* expanded = task_scratch().take<uint8_t>(job.block_bytes);
    for (size_t b = task * step; b < std::min(blocks, (task + 1) * step); ++b) {
      expand_block(job, b, expanded);
      for (size_t strip = 0; strip < job.count; ++strip)
        multiply(job, source.quantizer, strip, panels + strip * job.panel_bytes, b, expanded, dst);
    }
  });
}

}  // namespace

bool conv_fits_pixels(const Conv& op, const ConvShape& shape, const Products& products) {
  const bool flat = shape.in[0] == 1 && shape.kernel[0] == 1 && shape.out[0] == 1;
  const size_t lanes = op.kernels->pixel_lanes;
  // Where many lanes would be empty, rows are faster.
  const bool full = lanes && round_up(shape.num_out(), lanes) * 7 <= shape.num_out() * 8;
  return full && products.elements != Elements::kFloats && products.lhs_planes == 1 &&
         op.weight->segments.size() == 1 && shape.groups == 1 && shape.channels_in % kTileK == 0 &&
         flat && shape.num_out() >= kLeastLanes && shape.out[2] <= kMostPixels &&
         (products.elements == Elements::kWords ||
          (products.rhs_planes == 1 && op.weight->limits[0] <= op.kernels->a8_byte_limit));
}

void conv_pixels(const Conv& op, const ConvShape& shape, const Products& products, const float* src,
                 size_t batch, const ConvTarget& dst, const Parallel& parallel) {
  const Job job(op, shape, products);
  const bool many = job.count >= kManyStrips;
  const size_t weight_bytes = many ? op.weight->num_blocks * job.block_bytes : 0;
  const size_t plane_bytes = job.taps ? shape.channels_in / job.steps * shape.num_in() * kDword : 0;
  const size_t panels_bytes = many ? 0 : job.count * job.panel_bytes;
  Scratch& scratch = layer_scratch();
  scratch.reset(Scratch::room<uint8_t>(weight_bytes) + Scratch::room<uint8_t>(plane_bytes) +
                Scratch::room<uint8_t>(panels_bytes));
  uint8_t* expanded = scratch.take<uint8_t>(weight_bytes);
  uint8_t* planes = scratch.take<uint8_t>(plane_bytes);
  uint8_t* panels = scratch.take<uint8_t>(panels_bytes);
  if (many) expand_all(job, expanded, parallel);
  for (size_t i = 0; i < batch; ++i) {
    const float* floats = src + i * shape.channels_in * shape.num_in();
    const RowQuantizer quantizer = sample_quantizer(op, shape, floats, parallel);
    if (job.taps) quantize_planes(job, quantizer, floats, planes, parallel);
    const Source source = {floats, planes, quantizer};
    const size_t at = i * shape.channels_out * shape.num_out();
    const Planes sample_dst = {dst.floats + at,
                               dst.float_residual ? dst.float_residual + at : nullptr};
    if (many) {
      run_many_strips(job, source, expanded, sample_dst, parallel);
    } else {
      run_few_strips(job, source, panels, sample_dst, parallel);
    }
  }
}

}  // namespace afpq
