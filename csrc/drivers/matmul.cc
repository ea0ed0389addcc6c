#include "drivers/matmul.h"

#include <algorithm>

#include "core/scratch.h"

namespace afpq {
namespace {

constexpr size_t kTaskElements = size_t{1}
                                 << 14;  // rounding fewer elements than this is not worth a task

}  // namespace

void matmul(const Matmul& op, const float* lhs, size_t m, float* dst, const Parallel& parallel) {
  const PackedWeight& weight = *op.weight;
  const size_t k = weight.k, padded = weight.num_tiles * kTileK;
  const int planes = lhs_planes(op.rounding.mode, weight.format);
  Scratch& scratch = layer_scratch();
  const bool copy_floats = planes == 0 && padded != k;
  scratch.reset(Scratch::room<float>(m) + Scratch::room<int32_t>(m) +
                2 * Scratch::room<uint8_t>(m * padded) +
                (copy_floats ? Scratch::room<float>(m * padded) : 0));
  float* row_scales = scratch.take<float>(m);
  int32_t* zero_points = scratch.take<int32_t>(m);
  uint8_t* bytes[2] = {scratch.take<uint8_t>(m * padded), scratch.take<uint8_t>(m * padded)};
  float* floats = copy_floats ? scratch.take<float>(m * padded) : nullptr;

  const size_t rows_a_task = std::max<size_t>(1, kTaskElements / k);
  parallel_for(parallel, ceil_div(m, rows_a_task), [&](size_t task) {
    for (size_t r = task * rows_a_task; r < std::min(m, (task + 1) * rows_a_task); ++r) {
      const float* row = lhs + r * k;
      if (planes == 0) {
        row_scales[r] = 1.0f;
        if (copy_floats)
          std::fill(std::copy(row, row + k, floats + r * padded), floats + (r + 1) * padded, 0.0f);
        continue;
      }
      float low, high;
      int finite;
      op.kernels->range_f32(row, k, &low, &high, &finite);
      RowQuantizer quantizer = row_quantizer(op.rounding, low, high, finite);
      row_scales[r] = quantizer.scale;
      zero_points[r] = quantizer.quantize.zero_point;
      for (int p = 0; p < planes; ++p) {
        quantizer.quantize.planes[p] = bytes[p] + r * padded;
        std::fill(bytes[p] + r * padded + k, bytes[p] + (r + 1) * padded, uint8_t{0});
      }
      op.kernels->quantize_u8_f32(row, k, &quantizer.quantize);
    }
  });

  GemmJob job;
  job.kernels = op.kernels;
  job.weight = op.weight;
  job.mode = op.rounding.mode;
  job.lhs.bytes[0] = bytes[0];
  job.lhs.bytes[1] = bytes[1];
  job.lhs.floats = copy_floats ? floats : lhs;
  job.lhs.stride = planes == 0 && !copy_floats ? k : padded;
  job.row_scales = row_scales;
  job.zero_points = zero_points;
  job.bias = op.bias;
  job.low = op.low;
  job.high = op.high;
  job.dst = dst;
  job.row_stride = weight.n;
  job.channel_stride = 1;
  job.m = m;
  job.n = weight.n;
  gemm(job, parallel);
}

}  // namespace afpq
