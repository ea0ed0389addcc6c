#include "drivers/matmul.h"

#include <algorithm>
#include <cstring>

#include "core/scratch.h"

namespace afpq {
namespace {

constexpr size_t kTaskElements = size_t{1}
                                 << 14;  // rounding fewer elements than this is not worth a task

}  // namespace

void matmul(const Matmul& op, const float* lhs, size_t m, const float* residual, float* dst,
            const Parallel& parallel) {
  const PackedWeight& weight = *op.weight;
  const size_t k = weight.k, padded = weight.num_tiles * kTileK;
  const Products products = products_of(*op.kernels, op.rounding.mode, weight, m);
  const bool floats = products.elements == Elements::kFloats;
  const bool words = products.elements == Elements::kWords;
  const size_t plane_bytes = floats && padded == k ? 0 : m * padded * products.element_bytes();
  Scratch& scratch = layer_scratch();
  scratch.reset(Scratch::room<float>(m) + Scratch::room<int32_t>(m) +
                2 * Scratch::room<uint8_t>(plane_bytes));
  float* row_scales = scratch.take<float>(m);
  int32_t* zero_points = scratch.take<int32_t>(m);
  uint8_t* planes[2];
  for (int p = 0; p < products.lhs_planes; ++p) planes[p] = scratch.take<uint8_t>(plane_bytes);

  const size_t rows_a_task = std::max<size_t>(1, kTaskElements / k);
  parallel_for(parallel, ceil_div(m, rows_a_task), [&](size_t task) {
    for (size_t r = task * rows_a_task; r < std::min(m, (task + 1) * rows_a_task); ++r) {
      const float* row = lhs + r * k;
      const size_t begin = r * padded * products.element_bytes();
      const size_t used = k * products.element_bytes(), bytes = padded * products.element_bytes();
      if (plane_bytes) {
        for (int p = 0; p < products.lhs_planes; ++p)
          std::fill(planes[p] + begin + used, planes[p] + begin + bytes, uint8_t{0});
      }
      if (floats) {
        row_scales[r] = 1.0f;
        if (plane_bytes) std::memcpy(planes[0] + begin, row, used);
        continue;
      }
      AfpqRange range;
      op.kernels->range_f32(row, k, &range);
      RowQuantizer quantizer = row_quantizer(op.rounding, range);
      row_scales[r] = quantizer.scale;
      zero_points[r] = quantizer.zero_element(products.elements);
      for (int p = 0; p < products.lhs_planes; ++p)
        quantizer.quantize.planes[p] = planes[p] + begin;
      quantizer.quantize.words = reinterpret_cast<int16_t*>(planes[0] + begin);
      const auto quantize = words ? op.kernels->quantize_s16_f32 : op.kernels->quantize_u8_f32;
      quantize(row, k, &quantizer.quantize);
    }
  });

  GemmJob job;
  job.kernels = op.kernels;
  job.weight = op.weight;
  job.products = products;
  for (int p = 0; p < products.lhs_planes; ++p) job.lhs.planes[p] = planes[p];
  if (!plane_bytes) job.lhs.planes[0] = lhs;
  job.lhs.stride = padded;
  job.row_scales = row_scales;
  job.zero_points = zero_points;
  job.bias = op.bias;
  job.low = op.low;
  job.high = op.high;
  job.dst = dst;
  job.residual.floats = residual;
  job.row_stride = weight.n;
  job.channel_stride = 1;
  job.m = m;
  job.n = weight.n;
  gemm(job, parallel);
}

}  // namespace afpq
