// The kernel table for AVX-512 with VNNI and VBMI. Loads and stores at the ends are masked, so
// nothing is read or written beyond what kernels.h documents.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns inside its own intrinsics (PR 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

namespace {

constexpr size_t kLanes = 16;

__mmask16 first_lanes(size_t count) {
  return static_cast<__mmask16>(_bzhi_u32(0xffff, static_cast<unsigned>(count)));
}
__mmask64 first_bytes(size_t count) { return _bzhi_u64(~0ull, static_cast<unsigned>(count)); }

// Mask of the vector at `begin` of `end` elements.
__mmask16 lanes_at(size_t begin, size_t end) {
  return first_lanes(end - begin < kLanes ? end - begin : kLanes);
}

// The second operand stays when it is NaN or when both are zeros, as in the reference.
__m512 clamp(__m512 value, __m512 low, __m512 high) {
  return _mm512_min_ps(high, _mm512_max_ps(low, value));
}

// Cuts the 64 codes of a tile into bytes. Eight codes take `bits` bytes, so:
//   vpermb          64-bit lane i <- bytes i * bits .. i * bits + 7
//   vpmultishiftqb  byte j of each lane <- the 8 bits from bit j * bits of the lane
// Bits above a code are those of its neighbour; every lookup ignores them.
struct Cutter {
  static constexpr size_t kAhead = 4096;

  __mmask64 bytes;
  __m512i spread;
  __m512i offsets;

  explicit Cutter(unsigned bits) {
    constexpr long long kCount = 0x0706050403020100, kOnes = 0x0101010101010101;
    const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    bytes = first_bytes(8 * bits);
    spread = _mm512_add_epi64(_mm512_set1_epi64(kCount),
                              _mm512_mullo_epi64(lane, _mm512_set1_epi64(kOnes * bits)));
    offsets = _mm512_set1_epi64(kCount * bits);
  }

  __m512i operator()(const uint8_t* src) const {
    // Codes come from memory once: ask for them long before.
    _mm_prefetch(reinterpret_cast<const char*>(src) + kAhead, _MM_HINT_T0);
    return _mm512_multishift_epi64_epi8(
        offsets, _mm512_permutexvar_epi8(spread, _mm512_maskz_loadu_epi8(bytes, src)));
  }
};

// The same of codes of 4 bits: both halves of a byte become bytes. Faster, but for codes that come
// from memory.
struct HalvesCutter {
  explicit HalvesCutter(unsigned /*bits*/) {}

  __m512i operator()(const uint8_t* src) const {
    _mm_prefetch(reinterpret_cast<const char*>(src) + Cutter::kAhead, _MM_HINT_T0);
    const __m512i words =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
    return _mm512_or_si512(words, _mm512_slli_epi16(words, 4));
  }
};

// Entry `code` of a table of 256 bytes that is periodic in 2^bits: vpermb reads 6 bits of an index,
// vpermi2b 7. kLevel: 0 up to 6 bits, 1 for 7, 2 for 8.
template <int kLevel>
struct ByteTable {
  __m512i t0, t1, t2, t3;

  explicit ByteTable(const int8_t* table)
      : t0(_mm512_loadu_si512(table)),
        t1(_mm512_loadu_si512(table + 64)),
        t2(_mm512_loadu_si512(table + 128)),
        t3(_mm512_loadu_si512(table + 192)) {}

  [[gnu::always_inline]] __m512i operator()(__m512i code) const {
    if constexpr (kLevel == 0) return _mm512_permutexvar_epi8(code, t0);
    const __m512i below = _mm512_permutex2var_epi8(t0, code, t1);
    if constexpr (kLevel == 1) return below;
    const __m512i above = _mm512_permutex2var_epi8(t2, code, t3);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), below, above);
  }
};

template <int kLevel>
void expand_s8(const uint8_t* src, size_t num_tiles, unsigned bits, const int8_t* table,
               int8_t* dst) {
  const Cutter cut(bits);
  const ByteTable<kLevel> lookup(table);
  const int8_t* end = dst + num_tiles * kTileCodes;
#pragma GCC unroll 4
  for (; dst < end; src += 8 * bits, dst += kTileCodes) {
    _mm512_storeu_si512(dst, lookup(cut(src)));
  }
}

void expand_s8_afp_avx512vnni(const uint8_t* src, size_t num_tiles, unsigned bits,
                              const int8_t* table, int8_t* dst) {
  const auto expand = bits <= 6 ? expand_s8<0> : bits == 7 ? expand_s8<1> : expand_s8<2>;
  expand(src, num_tiles, bits, table, dst);
}

// The bytes of steps 0 and 1 of all channels, then those of steps 2 and 3.
__m512i by_pairs() {
  alignas(64) uint8_t order[kTileCodes];
  for (size_t i = 0; i < kTileCodes; ++i)
    order[i] = static_cast<uint8_t>(i % 32 / 2 * kTileK + i / 32 * 2 + i % 2);
  return _mm512_load_si512(order);
}

// Entry `code` of a table of 64 << kLevel words: vpermi2w reads 6 bits of an index, blends do the
// rest.
template <int kLevel>
[[gnu::always_inline]] inline __m512i lookup_words(const int16_t* __restrict table, __m512i code) {
  if constexpr (kLevel == 0) {
    return _mm512_permutex2var_epi16(_mm512_loadu_si512(table), code,
                                     _mm512_loadu_si512(table + 32));
  } else {
    constexpr int kHalf = 32 << kLevel;
    const __mmask32 upper = _mm512_test_epi16_mask(code, _mm512_set1_epi16(kHalf));
    return _mm512_mask_blend_epi16(upper, lookup_words<kLevel - 1>(table, code),
                                   lookup_words<kLevel - 1>(table + kHalf, code));
  }
}

template <int kLevel>
void expand_s16(const uint8_t* __restrict src, size_t num_tiles, unsigned bits,
                const int16_t* __restrict table, int16_t* __restrict dst) {
  const Cutter cut(bits);
  const __m512i order = by_pairs();
  for (size_t tile = 0; tile < num_tiles; ++tile, src += 8 * bits, dst += kTileCodes) {
    const __m512i codes = _mm512_permutexvar_epi8(order, cut(src));
    const __m512i first = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(codes));
    const __m512i second = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(codes, 1));
    _mm512_storeu_si512(dst, lookup_words<kLevel>(table, first));
    _mm512_storeu_si512(dst + 2 * kTileN, lookup_words<kLevel>(table, second));
  }
}

void expand_s16_afp_avx512vnni(const uint8_t* src, size_t num_tiles, unsigned bits,
                               const int16_t* table, int16_t* dst) {
  const auto expand = bits <= 6 ? expand_s16<0> : bits == 7 ? expand_s16<1> : expand_s16<2>;
  expand(src, num_tiles, bits, table, dst);
}

// Entry `code` of a table of 32 << kLevel floats: vpermi2ps reads 5 bits of an index, blends do the
// rest.
template <int kLevel>
inline __attribute__((always_inline)) __m512 lookup(const float* __restrict table, __m512i code) {
  if constexpr (kLevel == 0) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), code, _mm512_loadu_ps(table + kLanes));
  } else {
    constexpr int kHalf = 16 << kLevel;
    const __mmask16 upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(kHalf));
    return _mm512_mask_blend_ps(upper, lookup<kLevel - 1>(table, code),
                                lookup<kLevel - 1>(table + kHalf, code));
  }
}

// Byte j of dword c is the code of (channel c, step j), so a shift brings a step's codes in place.
template <int kLevel>
void expand_f32(const uint8_t* __restrict src, size_t num_tiles, unsigned bits,
                const float* __restrict table, float* __restrict dst) {
  const Cutter cut(bits);
  for (size_t tile = 0; tile < num_tiles; ++tile, src += 8 * bits, dst += kTileCodes) {
    const __m512i codes = cut(src);
    _mm512_storeu_ps(dst, lookup<kLevel>(table, codes));
    _mm512_storeu_ps(dst + 16, lookup<kLevel>(table, _mm512_srli_epi32(codes, 8)));
    _mm512_storeu_ps(dst + 32, lookup<kLevel>(table, _mm512_srli_epi32(codes, 16)));
    _mm512_storeu_ps(dst + 48, lookup<kLevel>(table, _mm512_srli_epi32(codes, 24)));
  }
}

void expand_f32_afp_avx512vnni(const uint8_t* src, size_t num_tiles, unsigned bits,
                               const float* table, float* dst) {
  const auto expand = bits <= 5   ? expand_f32<0>
                      : bits == 6 ? expand_f32<1>
                      : bits == 7 ? expand_f32<2>
                                  : expand_f32<3>;
  expand(src, num_tiles, bits, table, dst);
}

#include "avx512vnni_gemm.inc"
#include "avx512vnni_pixels.inc"
#include "avx512vnni_quantize.inc"
#include "avx512vnni_taps.inc"
#include "avx512vnni_transpose.inc"

// Behind the parts that they use.
#include "avx512vnni_bytes.inc"
#include "avx512vnni_depthwise.inc"
#include "avx512vnni_planar.inc"
#include "avx512vnni_planar_lanes.inc"
#include "avx512vnni_store.inc"

struct Range {
  __m512i above = _mm512_setzero_si512();
  __m512i below = _mm512_setzero_si512();

  void add(__m512i bits) {
    above = _mm512_max_epi32(above, bits);
    below = _mm512_max_epu32(below, bits);
  }
  void add(const Range& other) {
    above = _mm512_max_epi32(above, other.above);
    below = _mm512_max_epu32(below, other.below);
  }
};

void range_f32_avx512vnni(const float* src, size_t count, AfpqRange* range) {
  Range a, b, c, d;
  size_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    a.add(_mm512_loadu_si512(src + i));
    b.add(_mm512_loadu_si512(src + i + 16));
    c.add(_mm512_loadu_si512(src + i + 32));
    d.add(_mm512_loadu_si512(src + i + 48));
  }
  for (; i < count; i += kLanes) a.add(_mm512_maskz_loadu_epi32(lanes_at(i, count), src + i));
  c.add(d);
  a.add(b);
  a.add(c);
  range->above = _mm512_reduce_max_epi32(a.above);
  range->below = _mm512_reduce_max_epu32(a.below);
}

}  // namespace

const AfpqKernels kAfpqKernelsAvx512Vnni = {
    "avx512vnni",
    1,
    128,
    6,
    16,
    expand_s8_afp_avx512vnni,
    expand_s16_afp_avx512vnni,
    expand_f32_afp_avx512vnni,
    gemm_s32_u8_s8_avx512vnni,
    gemm_s32_u8_afp_avx512vnni,
    gemm_s32_s16_s16_avx512vnni,
    depthwise_s32_u8_s16_avx512vnni,
    gemm_f32_f32_f32_avx512vnni,
    gemm_pixels_f32_u8_s8_avx512vnni,
    gemm_pixels_f32_s16_s16_avx512vnni,
    range_f32_avx512vnni,
    quantize_u8_f32_avx512vnni,
    quantize_s16_f32_avx512vnni,
    quantize_transpose_u8_f32_avx512vnni,
    quantize_transpose_s16_f32_avx512vnni,
    quantize_pixels_u8_f32_avx512vnni,
    quantize_pixels_s16_f32_avx512vnni,
    transpose_f32_avx512vnni,
    combine_f32_s32_avx512vnni,
    store_f32_avx512vnni,
    finish_f32_s32_avx512vnni,
    store_u8_f32_avx512vnni,
    finish_u8_s32_avx512vnni,
    add_clamp_f32_avx512vnni,
    pick_f32_avx512vnni,
    planar_f32_avx512vnni,
    planar_rows_f32_avx512vnni,
    depthwise_f32_avx512vnni,
};
