// dst[m, n] = clamp(lhs[m, k] * weight[n, k]^T + bias + residual), rows of lhs rounded on the way
// in as `rounding` says.
#pragma once

#include "drivers/gemm.h"

namespace afpq {

struct Matmul {
  const AfpqKernels* kernels = nullptr;
  const PackedWeight* weight = nullptr;
  LhsRounding rounding;
  const float* bias = nullptr;  // [n] or null
  float low, high;
};

// lhs: [m, k]; residual, or null, and dst: [m, n]; all contiguous.
void matmul(const Matmul& op, const float* lhs, size_t m, const float* residual, float* dst,
            const Parallel& parallel);

}  // namespace afpq
