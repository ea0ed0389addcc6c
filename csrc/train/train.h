// Rounding and rounded products over threads.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "core/parallel.h"
#include "train/kernels.h"

namespace afpq {

// A random seed, or none: then rounding is to nearest.
struct Seed {
  bool stochastic;
  uint64_t value;
};

// The table that belongs to an instruction set of kernels/dispatch.h.
const AfpqTrainKernels& train_kernels(const char* isa);

void round_values(const AfpqTrainKernels& kernels, const Parallel& parallel,
                  const AfpqFloatFormat& format, Seed seed, const float* src, float* dst,
                  size_t size);

// dst[m, n] = lhs[m, k] * rhs[k, n], k in chunks of `chunk` (at least 1); the last one may be
// shorter. Products are rounded to float32, which is exact for operands of at most 12 significant
// bits; sums are rounded to float32, then to `format`, which for at most 11 significant bits is the
// same as once. k is below 2^32.
void multiply_rounded(const AfpqTrainKernels& kernels, const Parallel& parallel,
                      const AfpqFloatFormat& format, Seed seed, size_t chunk, const float* lhs,
                      const float* rhs, size_t m, size_t n, size_t k, float* dst);

}  // namespace afpq
