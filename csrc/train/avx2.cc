// Vectors of 32 bytes.
#include <immintrin.h>

#include "train/kernels.h"

namespace {

constexpr int kLanes = 8;
typedef float Float __attribute__((vector_size(32)));
typedef int32_t Signed __attribute__((vector_size(32)));
typedef uint32_t Unsigned __attribute__((vector_size(32)));

inline Unsigned multiply(Unsigned a, uint32_t factor, Unsigned* low) {
  const __m256i factors = _mm256_set1_epi64x(factor);
  const __m256i even = _mm256_mul_epu32((__m256i)a, factors);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factors);
  *low = (Unsigned)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  return (Unsigned)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

#include "train/kernels.inc"

}  // namespace

const AfpqTrainKernels kAfpqTrainAvx2 = {
    "avx2", kLanes, round_nearest, round_stochastic, add_chunk, add_chunk_stochastic,
};
