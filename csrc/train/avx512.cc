// Vectors of 64 bytes.
#include <immintrin.h>

#include "train/kernels.h"

namespace {

constexpr int kLanes = 16;
typedef float Float __attribute__((vector_size(64)));
typedef int32_t Signed __attribute__((vector_size(64)));
typedef uint32_t Unsigned __attribute__((vector_size(64)));

inline Unsigned multiply(Unsigned a, uint32_t factor, Unsigned* low) {
  // The plain forms of these intrinsics warn about their own undefined values in GCC 12.
  const __m512i factors = _mm512_set1_epi64(factor);
  const __m512i even = _mm512_maskz_mul_epu32(0xff, (__m512i)a, factors);
  const __m512i odd =
      _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, (__m512i)a, 32), factors);
  *low = (Unsigned)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_maskz_slli_epi64(0xff, odd, 32));
  return (Unsigned)_mm512_mask_blend_epi32(0xaaaa, _mm512_maskz_srli_epi64(0xff, even, 32), odd);
}

#include "train/kernels.inc"

}  // namespace

const AfpqTrainKernels kAfpqTrainAvx512 = {
    "avx512vnni", kLanes, round_nearest, round_stochastic, add_chunk, add_chunk_stochastic,
};
