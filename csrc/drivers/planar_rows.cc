// Convolutions of a few channels from float planes with channels in the lanes: the first layer of a
// network, if it makes bytes, which lie so, or narrow rows. The input rows of a strip of outputs
// are copied with their padding, so that taps and pixels are plain offsets.
#include <algorithm>
#include <array>

#include "core/scratch.h"
#include "drivers/conv_paths.h"
#include "drivers/panel.h"

namespace afpq {
namespace {

constexpr size_t kStripElements = 7168;  // of input rows: 28 KB

// A strip is so many output rows at one depth, in parts of so many blocks of 16 channels: planes of
// floats are best written whole, as in `run_small_sample`.
struct Strips {
  size_t blocks;  // of a part, less at the end
  size_t parts;
  size_t planes;  // input rows come from so many (channel, tap in depth)
  size_t width;   // of an input row, with its padding
  size_t height;  // the most
  size_t rows;    // input rows of a strip in one plane
  size_t per_depth;
  size_t count;  // of a sample

  Strips(const ConvShape& shape, size_t batch, bool to_bytes) {
    constexpr size_t kFewParts = 2;
    const size_t all = ceil_div(shape.channels_out, kTileN);
    blocks = to_bytes ? all : std::min<size_t>(ceil_div(all, kFewParts), kPanelBlocks);
    parts = ceil_div(all, blocks);
    planes = shape.channels_in * shape.kernel[0];
    width = shape.num_reached(2);
    const size_t fitting = kStripElements / (planes * width);
    height = fitting > shape.reach(1) ? (fitting - shape.reach(1) - 1) / shape.strides[1] + 1 : 1;
    height = std::min(height, shape.out[1]);
    height = strip_height(height, batch * shape.out[0] * ceil_div(shape.out[1], height) * parts,
                          height * shape.out[2] * ceil_div(shape.channels_out, parts) *
                              shape.num_taps() * shape.channels_in,
                          1);
    per_depth = ceil_div(shape.out[1], height);
    height = ceil_div(shape.out[1], per_depth);
    rows = (height - 1) * shape.strides[1] + shape.reach(1) + 1;
    count = shape.out[0] * per_depth;
  }
  // The first row of strip `index` of a depth, or the end.
  size_t row(const ConvShape& shape, size_t index) const {
    return shape.out[1] * index / per_depth;
  }
};

// Working memory of one task.
struct Workspace {
  float* rows;     // [planes][rows][width]
  size_t* taps;    // [k], as elements of `rows`
  size_t* pixels;  // [height * columns], the same
  float* weights;  // [strips.blocks][4 * num_tiles][16]
  float* sums;     // [kBlockRows][kPanelN]

  Workspace(const Conv& op, const ConvShape& shape, const Strips& strips, size_t first_block) {
    using S = Scratch;
    const PackedWeight& weight = *op.weight;
    const size_t num_rows = strips.planes * strips.rows * strips.width;
    const size_t block = weight.num_tiles * kTileCodes;
    Scratch& scratch = task_scratch();
    const size_t num_pixels = strips.height * shape.out[2];
    scratch.reset(S::room<float>(num_rows) + S::room<size_t>(weight.k) +
                  S::room<size_t>(num_pixels) + S::room<float>(strips.blocks * block) +
                  S::room<float>(kBlockRows * kPanelN));
    rows = scratch.take<float>(num_rows);
    taps = scratch.take<size_t>(weight.k);
    pixels = scratch.take<size_t>(num_pixels);
    weights = scratch.take<float>(strips.blocks * block);
    sums = scratch.take<float>(kBlockRows * kPanelN);
    list_taps(shape, strips);
    size_t* pixel = pixels;
    for (size_t y = 0; y < strips.height; ++y) {
      for (size_t x = 0; x < shape.out[2]; ++x)
        *pixel++ = y * shape.strides[1] * strips.width + x * shape.strides[2];
    }
    const size_t last = std::min(first_block + strips.blocks, weight.num_blocks);
    for (size_t b = first_block; b < last; ++b) {
      op.kernels->expand_f32_afp(weight.block(b), weight.num_tiles, weight.format.bits(),
                                 weight.tables.value, weights + (b - first_block) * block);
    }
  }

 private:
  // Stored order: k = tap * channels + channel.
  void list_taps(const ConvShape& shape, const Strips& strips) {
    size_t* tap = taps;
    for (size_t kz = 0; kz < shape.kernel[0]; ++kz) {
      for (size_t ky = 0; ky < shape.kernel[1]; ++ky) {
        for (size_t kx = 0; kx < shape.kernel[2]; ++kx) {
          for (size_t c = 0; c < shape.channels_in; ++c) {
            const size_t row = (c * shape.kernel[0] + kz) * strips.rows + ky * shape.dilations[1];
            *tap++ = row * strips.width + kx * shape.dilations[2];
          }
        }
      }
    }
  }
};

// The input rows of the strip that begins at (z, y). src: a sample.
void copy_strip(const AfpqKernels& kernels, const ConvShape& shape, const Strips& strips, size_t z,
                size_t y, const float* src, float* dst) {
  // Rows [begin, end) of those that the strip reads are in the input.
  const size_t first = y * shape.strides[1], pad = shape.pads[1];
  const size_t begin = std::min(pad > first ? pad - first : 0, strips.rows);
  const size_t end =
      std::clamp(shape.in[1] + pad > first ? shape.in[1] + pad - first : 0, begin, strips.rows);
  const size_t left = std::min(shape.pads[2], strips.width);
  const size_t count = std::min(shape.in[2], strips.width - left);
  const size_t plane = strips.rows * strips.width;
  for (size_t c = 0; c < shape.channels_in; ++c, src += shape.num_in()) {
    for (size_t kz = 0; kz < shape.kernel[0]; ++kz, dst += plane) {
      const size_t depth = z * shape.strides[0] + kz * shape.dilations[0] - shape.pads[0];
      if (depth >= shape.in[0]) {
        std::fill(dst, dst + plane, 0.0f);
        continue;
      }
      fill_around_rows(dst, 0, plane, begin, end, strips.width, left, count, 0.0f);
      if (begin == end) continue;
      kernels.pick_f32(src + (depth * shape.in[1] + first + begin - pad) * shape.in[2], shape.in[2],
                       1, end - begin, count, strips.width, dst + begin * strips.width + left);
    }
  }
}

// Where the outputs of a strip go: those of the first channel, or of the first pixel.
struct Outputs {
  float* floats;
  const float* residual;  // like floats, or null
  uint8_t* bytes;
};

// Rows of sums, for pixels from `first` on and channels from c on.
void store_floats(const Conv& op, const PlanarEnd& end, const Outputs& dst, size_t first, size_t c,
                  const AfpqPlanarRows& sums, size_t channel_stride) {
  // Added to it, every number stays what it is.
  static constexpr auto kNothing = [] {
    std::array<float, kPanelN> zeros{};
    for (float& zero : zeros) zero = -0.0f;
    return zeros;
  }();
  const size_t at = c * channel_stride + first;
  // What is added later is clamped later.
  const AfpqStore store = {sums.dst,
                           kOnes.data(),
                           kNothing.data(),
                           dst.floats + at,
                           sums.num_pixels,
                           sums.num_channels,
                           1,
                           channel_stride,
                           dst.residual ? -kInfinity : end.low,
                           dst.residual ? kInfinity : end.high};
  op.kernels->store_f32(&store);
  if (dst.residual) {
    op.kernels->add_clamp_f32(dst.residual + at, channel_stride, sums.num_channels, sums.num_pixels,
                              end.low, end.high, store.dst);
  }
}

void store_bytes(const Conv& op, const PlanarEnd& end, const Outputs& dst, size_t first, size_t c,
                 const AfpqPlanarRows& sums, size_t channels) {
  static constexpr float kZeros[kPanelN] = {};
  const AfpqQuantize quantize = step_quantizer(op.dst_rounding);
  AfpqStoreBytes store = {};
  store.src = sums.dst;
  store.row_scales = kOnes.data();
  store.bias = kZeros;
  store.quantize = &quantize;
  store.dst = dst.bytes + first * channels + c;
  store.num_rows = sums.num_pixels;
  store.num_channels = sums.num_channels;
  store.stride = channels;
  store.low = end.low;
  store.high = end.high;
  op.kernels->store_u8_f32(&store);
}

// Channels [begin, last) of the first `count` pixels of a strip.
void finish_strip(const Conv& op, const ConvShape& shape, const PlanarEnd& end,
                  const Workspace& work, size_t count, size_t begin, size_t last,
                  const Outputs& dst) {
  static constexpr float kZeros[kPanelN] = {};
  AfpqPlanarRows args = {};
  args.src = work.rows;
  args.taps = work.taps;
  args.dst = work.sums;
  args.num_taps = op.weight->k;
  args.num_tiles = op.weight->num_tiles;
  for (size_t first = 0; first < count; first += kBlockRows) {
    args.pixels = work.pixels + first;
    args.num_pixels = std::min(kBlockRows, count - first);
    for (size_t c = begin; c < last; c += kPanelN) {
      args.weights = work.weights + (c - begin) * op.weight->num_tiles * kTileK;
      args.scales = end.scales + c;
      args.bias = end.bias ? end.bias + c : kZeros;
      args.num_channels = std::min<size_t>(kPanelN, last - c);
      op.kernels->planar_rows_f32(&args);
      if (dst.bytes) {
        store_bytes(op, end, dst, first, c, args, shape.channels_out);
      } else {
        store_floats(op, end, dst, first, c, args, shape.num_out());
      }
    }
  }
}

}  // namespace

void conv_planar_rows(const Conv& op, const ConvShape& shape, const float* src, size_t batch,
                      const ConvTarget& dst, const Parallel& parallel) {
  const Strips strips(shape, batch, dst.bytes != nullptr);
  const PlanarEnd end(op, shape.channels_out, dst.bytes != nullptr);
  const size_t items = strips.parts * strips.count;
  parallel_for(parallel, batch * items, [&](size_t task) {
    const size_t sample = task / items, strip = task % strips.count;
    const size_t block = task % items / strips.count * strips.blocks;
    const size_t channel = block * kTileN;
    const size_t last = std::min(shape.channels_out, channel + strips.blocks * kTileN);
    const Workspace work(op, shape, strips, block);
    const size_t z = strip / strips.per_depth, y = strips.row(shape, strip % strips.per_depth);
    const size_t num_rows = strips.row(shape, strip % strips.per_depth + 1) - y;
    const size_t pixel = (z * shape.out[1] + y) * shape.out[2];
    const size_t at = sample * shape.channels_out * shape.num_out();
    copy_strip(*op.kernels, shape, strips, z, y, src + sample * shape.channels_in * shape.num_in(),
               work.rows);
    Outputs to = {};
    if (dst.bytes) {
      to.bytes = dst.bytes + at + pixel * shape.channels_out;
    } else {
      to.floats = dst.floats + at + pixel;
      to.residual = dst.float_residual ? dst.float_residual + at + pixel : nullptr;
    }
    finish_strip(op, shape, end, work, num_rows * shape.out[2], channel, last, to);
  });
}

}  // namespace afpq
