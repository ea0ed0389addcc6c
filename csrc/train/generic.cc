// Vectors of 16 bytes, which every processor has.
#include "train/kernels.h"

namespace {

constexpr int kLanes = 4;
typedef float Float __attribute__((vector_size(16)));
typedef int32_t Signed __attribute__((vector_size(16)));
typedef uint32_t Unsigned __attribute__((vector_size(16)));

inline Unsigned multiply(Unsigned a, uint32_t factor, Unsigned* low) {
  Unsigned high;
  for (int l = 0; l < kLanes; ++l) {
    const uint64_t product = (uint64_t)a[l] * factor;
    high[l] = (uint32_t)(product >> 32);
    (*low)[l] = (uint32_t)product;
  }
  return high;
}

#include "train/kernels.inc"

}  // namespace

const AfpqTrainKernels kAfpqTrainGeneric = {
    "scalar", kLanes, round_nearest, round_stochastic, add_chunk, add_chunk_stochastic,
};
