// Depthwise convolutions of small float planes, with channels in the lanes.
//
//   for each 16 channels: transpose their planes to pixels, move those between padding, parallel
//                         multiply, transpose the results to planes
//
// Rows of a small plane would leave most of a vector empty; the two transpositions cost less.
#include <algorithm>
#include <vector>

#include "core/scratch.h"
#include "drivers/conv_paths.h"

namespace afpq {
namespace {

constexpr size_t kMostColumns = kTileN / 2;  // half a vector
constexpr size_t kMostPlane = 4096;          // pixels: 16 planes stay in L2

struct Lanes {
  size_t rows, columns;  // of a plane with its padding
  std::vector<size_t> taps;

  explicit Lanes(const ConvShape& shape)
      : rows(shape.num_reached(1)), columns(shape.num_reached(2)) {
    taps.reserve(shape.num_taps());
    for (size_t ky = 0; ky < shape.kernel[1]; ++ky) {
      for (size_t kx = 0; kx < shape.kernel[2]; ++kx) {
        const size_t row = ky * shape.dilations[1], column = kx * shape.dilations[2];
        taps.push_back((row * columns + column) * kTileN);
      }
    }
  }
};

// Working memory of one task.
struct Workspace {
  float* pixels;   // [num_in][16]
  float* padded;   // [rows][columns][16], zero where there is padding, which stays so
  float* results;  // [num_out][16]
  float* weights;  // [4 * num_tiles][16]

  Workspace(const ConvShape& shape, const Lanes& lanes, const PackedWeight& weight) {
    const size_t num_padded = lanes.rows * lanes.columns * kTileN;
    const size_t num_weights = weight.num_tiles * kTileCodes;
    Scratch& scratch = task_scratch();
    scratch.reset(Scratch::room<float>(shape.num_in() * kTileN) + Scratch::room<float>(num_padded) +
                  Scratch::room<float>(shape.num_out() * kTileN) +
                  Scratch::room<float>(num_weights));
    pixels = scratch.take<float>(shape.num_in() * kTileN);
    padded = scratch.take<float>(num_padded);
    results = scratch.take<float>(shape.num_out() * kTileN);
    weights = scratch.take<float>(num_weights);
    fill_padding(shape, lanes);
  }

 private:
  void fill_padding(const ConvShape& shape, const Lanes& lanes) const {
    const size_t top = shape.pads[1], left = std::min(shape.pads[2], lanes.columns);
    const size_t width = std::min(shape.in[2], lanes.columns - left);
    const size_t row = lanes.columns * kTileN;
    fill_around_rows(padded, 0, lanes.rows * row, top, std::min(top + shape.in[1], lanes.rows), row,
                     left * kTileN, width * kTileN, 0.0f);
  }
};

// Pixels between the padding, which all blocks of a task share.
void pad_pixels(const AfpqKernels& kernels, const ConvShape& shape, const Lanes& lanes,
                const Workspace& work) {
  const size_t top = shape.pads[1], left = shape.pads[2];
  if (top >= lanes.rows || left >= lanes.columns) return;
  const size_t width = std::min(shape.in[2], lanes.columns - left) * kTileN;
  kernels.pick_f32(work.pixels, shape.in[2] * kTileN, 1, std::min(shape.in[1], lanes.rows - top),
                   width, lanes.columns * kTileN,
                   work.padded + (top * lanes.columns + left) * kTileN);
}

// A block of 16 channels. src, dst: their planes; residual: of the results, or null.
void run_block(const Conv& op, const ConvShape& shape, const Lanes& lanes, size_t block,
               const float* src, const float* residual, float* dst, const Workspace& work) {
  static constexpr float kNoBias[kTileN] = {};
  const PackedWeight& weight = *op.weight;
  op.kernels->expand_f32_afp(weight.block(block), weight.num_tiles, weight.format.bits(),
                             weight.tables.value, work.weights);
  op.kernels->transpose_f32(src, shape.num_in(), kTileN, shape.num_in(), work.pixels);
  pad_pixels(*op.kernels, shape, lanes, work);
  AfpqDepthwise args = {};
  args.src = work.padded;
  args.taps = lanes.taps.data();
  args.weights = work.weights;
  args.scales = weight.scales.data() + block * kTileN;
  args.bias = op.bias ? op.bias + block * kTileN : kNoBias;
  args.dst = work.results;
  args.num_taps = lanes.taps.size();
  args.step = shape.strides[2] * kTileN;
  args.line_step = shape.strides[1] * lanes.columns * kTileN;
  args.num_lines = shape.out[1];
  args.num_columns = shape.out[2];
  // What is added later is clamped later.
  args.low = residual ? -kInfinity : op.low;
  args.high = residual ? kInfinity : op.high;
  op.kernels->depthwise_f32(&args);
  // Pixels are the channels of this transposition.
  op.kernels->transpose_f32(work.results, kTileN, shape.num_out(), kTileN, dst);
  if (residual) {
    op.kernels->add_clamp_f32(residual, shape.num_out(), kTileN, shape.num_out(), op.low, op.high,
                              dst);
  }
}

}  // namespace

bool conv_fits_lanes(const ConvShape& shape) {
  // Which the kernel of planes has a way of its own for.
  const bool nine = shape.kernel[1] == 3 && shape.kernel[2] == 3 && shape.dilations[1] == 1 &&
                    shape.dilations[2] == 1;
  return shape.is_flat() && conv_is_depthwise(shape) && shape.groups % kTileN == 0 &&
         (shape.out[2] <= kMostColumns || !nine) && shape.num_in() <= kMostPlane &&
         shape.num_reached(1) * shape.num_reached(2) <= 2 * kMostPlane;
}

void conv_planar_lanes(const Conv& op, const ConvShape& shape, const float* src, size_t batch,
                       const ConvTarget& dst, const Parallel& parallel) {
  const Lanes lanes(shape);
  const size_t blocks = shape.groups / kTileN, total = batch * blocks;
  const size_t work_of_one = shape.num_out() * lanes.taps.size() * kTileN;
  const size_t step = planar_step(total, work_of_one);
  parallel_for(parallel, ceil_div(total, step), [&](size_t task) {
    const Workspace work(shape, lanes, *op.weight);
    for (size_t i = task * step; i < std::min(total, (task + 1) * step); ++i) {
      const size_t at = i * kTileN * shape.num_out();
      run_block(op, shape, lanes, i % blocks, src + i * kTileN * shape.num_in(),
                dst.float_residual ? dst.float_residual + at : nullptr, dst.floats + at, work);
    }
  });
}

}  // namespace afpq
