// Convolutions of a few channels from float planes to rows of bytes: the first layer of an image
// network. The input rows of a strip of outputs are copied with their padding, so that taps are
// plain offsets, and sums have channels in the lanes, as bytes have them.
#include <algorithm>

#include "core/scratch.h"
#include "drivers/conv_paths.h"
#include "drivers/panel.h"
#include "drivers/patches.h"

namespace afpq {
namespace {

constexpr size_t kStripElements = 7168;  // of input rows: 28 KB

// A strip is `height` output rows (less at the end) at one depth.
struct Strips {
  size_t planes;  // input rows come from so many (channel, tap in depth)
  size_t width;   // of an input row, with its padding
  size_t height;
  size_t rows;  // input rows of a strip in one plane
  size_t per_depth;
  size_t count;  // of a sample

  explicit Strips(const ConvShape& shape) {
    planes = shape.channels_in * shape.kernel[0];
    width = shape.num_reached(2);
    const size_t fitting = kStripElements / (planes * width);
    height = fitting > shape.reach(1) ? (fitting - shape.reach(1) - 1) / shape.strides[1] + 1 : 1;
    height = std::min(height, shape.out[1]);
    rows = (height - 1) * shape.strides[1] + shape.reach(1) + 1;
    per_depth = ceil_div(shape.out[1], height);
    count = shape.out[0] * per_depth;
  }
};

// Working memory of one task.
struct Workspace {
  float* rows;     // [planes][rows][width]
  size_t* taps;    // [k], as elements of `rows`
  float* weights;  // [num_blocks][4 * num_tiles][16]
  float* sums;     // [kBlockRows][kPanelN]

  Workspace(const Conv& op, const ConvShape& shape, const Strips& strips) {
    using S = Scratch;
    const PackedWeight& weight = *op.weight;
    const size_t num_rows = strips.planes * strips.rows * strips.width;
    const size_t block = weight.num_tiles * kTileCodes;
    Scratch& scratch = task_scratch();
    scratch.reset(S::room<float>(num_rows) + S::room<size_t>(weight.k) +
                  S::room<float>(weight.num_blocks * block) + S::room<float>(kBlockRows * kPanelN));
    rows = scratch.take<float>(num_rows);
    taps = scratch.take<size_t>(weight.k);
    weights = scratch.take<float>(weight.num_blocks * block);
    sums = scratch.take<float>(kBlockRows * kPanelN);
    list_taps(shape, strips);
    for (size_t b = 0; b < weight.num_blocks; ++b) {
      op.kernels->expand_f32_afp(weight.block(b), weight.num_tiles, weight.format.bits(),
                                 weight.tables.value, weights + b * block);
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
void copy_strip(const ConvShape& shape, const Strips& strips, size_t z, size_t y, const float* src,
                float* dst) {
  for (size_t c = 0; c < shape.channels_in; ++c, src += shape.num_in()) {
    for (size_t kz = 0; kz < shape.kernel[0]; ++kz) {
      const size_t depth = z * shape.strides[0] + kz * shape.dilations[0];
      for (size_t r = 0; r < strips.rows; ++r, dst += strips.width)
        copy_line(shape, src, 1, depth, y * shape.strides[1] + r, 0.0f, dst);
    }
  }
}

// Outputs of one row of a strip, whose first pixel reads from `src` on.
void finish_row(const Conv& op, const ConvShape& shape, const PlanarEnd& end, const Workspace& work,
                const float* src, uint8_t* dst) {
  static constexpr float kZeros[kPanelN] = {};
  const AfpqQuantize quantize = step_quantizer(op.dst_rounding);
  AfpqPlanarRows args = {};
  args.taps = work.taps;
  args.dst = work.sums;
  args.num_taps = op.weight->k;
  args.num_tiles = op.weight->num_tiles;
  args.step = shape.strides[2];
  AfpqStoreBytes store = {};
  store.src = work.sums;
  store.row_scales = kOnes.data();
  store.bias = kZeros;
  store.quantize = &quantize;
  store.stride = shape.channels_out;
  store.low = end.low;
  store.high = end.high;
  for (size_t x = 0; x < shape.out[2]; x += kBlockRows) {
    args.src = src + x * shape.strides[2];
    args.num_pixels = store.num_rows = std::min(kBlockRows, shape.out[2] - x);
    for (size_t c = 0; c < shape.channels_out; c += kPanelN) {
      args.weights = work.weights + c * op.weight->num_tiles * kTileK;
      args.scales = end.scales + c;
      args.bias = end.bias ? end.bias + c : kZeros;
      args.num_channels = store.num_channels = std::min<size_t>(kPanelN, shape.channels_out - c);
      store.dst = dst + x * shape.channels_out + c;
      op.kernels->planar_rows_f32(&args);
      op.kernels->store_u8_f32(&store);
    }
  }
}

}  // namespace

void conv_planar_rows(const Conv& op, const ConvShape& shape, const float* src, size_t batch,
                      uint8_t* dst, const Parallel& parallel) {
  const Strips strips(shape);
  const PlanarEnd end(op, shape.channels_out, true);
  parallel_for(parallel, batch * strips.count, [&](size_t task) {
    const Workspace work(op, shape, strips);
    const size_t sample = task / strips.count, strip = task % strips.count;
    const size_t z = strip / strips.per_depth, y = strip % strips.per_depth * strips.height;
    const size_t num_rows = std::min(strips.height, shape.out[1] - y);
    const size_t pixel = sample * shape.num_out() + (z * shape.out[1] + y) * shape.out[2];
    copy_strip(shape, strips, z, y, src + sample * shape.channels_in * shape.num_in(), work.rows);
    for (size_t r = 0; r < num_rows; ++r) {
      finish_row(op, shape, end, work, work.rows + r * shape.strides[1] * strips.width,
                 dst + (pixel + r * shape.out[2]) * shape.channels_out);
    }
  });
}

}  // namespace afpq
