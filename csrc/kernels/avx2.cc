// The kernel table for AVX2 with FMA and BMI2. Ends go through masked loads and stores or short
// copies, so nothing is read or written beyond what kernels.h documents.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "compose.h"
#include "kernels.h"

namespace {

constexpr size_t kLanes = 8;

[[gnu::always_inline]] inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

[[gnu::always_inline]] inline __m256i first_lanes(size_t count) {
  static constexpr int32_t kMasks[2 * kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + kLanes - count));
}

// Vectors of up to 8 elements; those beyond `count` are zero or not written.
[[gnu::always_inline]] inline __m256 load(const float* src, size_t count) {
  return count >= kLanes ? _mm256_loadu_ps(src) : _mm256_maskload_ps(src, first_lanes(count));
}
[[gnu::always_inline]] inline __m256i load(const int32_t* src, size_t count) {
  return count >= kLanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src))
                         : _mm256_maskload_epi32(src, first_lanes(count));
}
// In pieces at the end: masked stores are slow on some processors.
[[gnu::always_inline]] inline void store(float* dst, size_t count, __m256 value) {
  if (count >= kLanes) return _mm256_storeu_ps(dst, value);
  __m128 part = _mm256_castps256_ps128(value);
  if (count & 4) {
    _mm_storeu_ps(dst, part);
    part = _mm256_extractf128_ps(value, 1);
    dst += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(dst), part);
    part = _mm_movehl_ps(part, part);
    dst += 2;
  }
  if (count & 1) _mm_store_ss(dst, part);
}

// The second operand stays when it is NaN or when both are zeros, as in the reference.
[[gnu::always_inline]] inline __m256 clamp(__m256 value, __m256 low, __m256 high) {
  return _mm256_min_ps(high, _mm256_max_ps(low, value));
}

// Cuts 32 codes, those of 8 channels, into bytes. In each 128-bit lane are 16 codes, 2 * kBits
// bytes:
//   load       from where 16 bytes end with the tile at the latest
//   vpshufb    dword c <- the bytes that hold the 4 codes of channel c
//   vpsrlvd    its first code to bit 0
// Then shifts and blends bring each code to a byte of its dword (cut_half). Bits above a code are
// those of its neighbour; every lookup ignores them.
template <unsigned kBits, unsigned kHalf>
struct Cutter {
  static constexpr unsigned kLane = 2 * kBits;

  // Where lane `lane` is loaded from, and how far its codes are from there.
  static constexpr unsigned begin(unsigned lane) { return (2 * kHalf + lane) * kLane; }
  static constexpr unsigned at(unsigned lane) {
    return begin(lane) < 4 * kLane - 16 ? begin(lane) : 4 * kLane - 16;
  }

  struct Indices {
    alignas(32) uint8_t bytes[32];
    alignas(32) uint32_t shifts[8];
  };
  static constexpr Indices make_indices() {
    Indices result = {};
    for (unsigned i = 0; i < 8; ++i) {
      const unsigned lane = i / 4, bit = i % 4 * 4 * kBits, from = begin(lane) - at(lane) + bit / 8;
      result.shifts[i] = bit % 8;
      for (unsigned b = 0; b < 4; ++b) {
        const bool used = 8 * b < bit % 8 + 4 * kBits;
        result.bytes[4 * i + b] = static_cast<uint8_t>(used ? from + b : 128);
      }
    }
    return result;
  }
  static constexpr Indices kIndices = make_indices();

  [[gnu::always_inline]] static __m256i dwords(const uint8_t* tile) {
    const auto load_lane = [&](unsigned lane) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + at(lane)));
    };
    const __m256i lanes =
        _mm256_inserti128_si256(_mm256_castsi128_si256(load_lane(0)), load_lane(1), 1);
    const auto constant = [](const void* src) {
      return _mm256_load_si256(static_cast<const __m256i*>(src));
    };
    const __m256i codes = _mm256_shuffle_epi8(lanes, constant(kIndices.bytes));
    if constexpr (kBits % 2 == 0) return codes;
    return _mm256_srlv_epi32(codes, constant(kIndices.shifts));
  }
};

// Upper bytes of words from `upper`, and upper words of dwords.
[[gnu::always_inline]] inline __m256i join_bytes(__m256i lower, __m256i upper) {
  return _mm256_blendv_epi8(lower, upper, _mm256_set1_epi16(static_cast<int16_t>(0xff00)));
}
[[gnu::always_inline]] inline __m256i join_words(__m256i lower, __m256i upper) {
  return _mm256_blend_epi16(lower, upper, 0xaa);
}

template <unsigned kBits, unsigned kHalf>
[[gnu::always_inline]] inline __m256i cut_half(const uint8_t* tile) {
  const __m256i codes = Cutter<kBits, kHalf>::dwords(tile);
  const __m256i words = join_words(codes, _mm256_slli_epi32(codes, 16 - 2 * kBits));
  return join_bytes(words, _mm256_slli_epi16(words, 8 - kBits));
}

// The same in the order of steps 0 2 1 3, so that even bytes are steps 0 and 1.
template <unsigned kBits, unsigned kHalf>
[[gnu::always_inline]] inline __m256i cut_half_pairs(const uint8_t* tile) {
  const __m256i codes = Cutter<kBits, kHalf>::dwords(tile);
  const __m256i from_1 = _mm256_slli_epi32(codes, 16 - kBits);
  if constexpr (kBits <= 5) {  // three codes fit a word
    const __m256i words = join_words(codes, from_1);
    return join_bytes(words, kBits <= 4 ? _mm256_slli_epi16(words, 8 - 2 * kBits)
                                        : _mm256_srli_epi16(words, 2 * kBits - 8));
  } else {
    return join_words(join_bytes(codes, _mm256_srli_epi32(codes, 2 * kBits - 8)),
                      join_bytes(from_1, _mm256_slli_epi32(codes, 24 - 3 * kBits)));
  }
}

// Entries of a table of 16 << kLevel bytes: vpshufb reads 4 bits of an index, blends by the sign
// bit do the rest.
template <int kLevel>
[[gnu::always_inline]] inline __m256i lookup(const int8_t* __restrict table, __m256i code,
                                             __m256i low_bits) {
  if constexpr (kLevel == 0) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), low_bits);
  } else {
    return _mm256_blendv_epi8(lookup<kLevel - 1>(table, code, low_bits),
                              lookup<kLevel - 1>(table + (8 << kLevel), code, low_bits),
                              _mm256_slli_epi16(code, 4 - kLevel));
  }
}

// What lies as far behind the tiles as these are long is most likely the next to be expanded, after
// other blocks: one prefetch a tile.
[[gnu::always_inline]] inline void prefetch(const uint8_t* src) {
  _mm_prefetch(reinterpret_cast<const char*>(src), _MM_HINT_T0);
}

template <unsigned kBits>
void expand_s8(const uint8_t* __restrict src, size_t num_tiles, const int8_t* __restrict table,
               int8_t* __restrict dst) {
  constexpr int kLevel = kBits <= 4 ? 0 : static_cast<int>(kBits) - 4;
  const __m256i low_bits = _mm256_set1_epi8(15);
  const size_t ahead = num_tiles * 8 * kBits;
  for (size_t tile = 0; tile < num_tiles; ++tile, src += 8 * kBits, dst += kTileCodes) {
    prefetch(src + ahead);
    const __m256i a = cut_half<kBits, 0>(src), b = cut_half<kBits, 1>(src);
    __m256i* to = reinterpret_cast<__m256i*>(dst);
    _mm256_storeu_si256(to, lookup<kLevel>(table, a, _mm256_and_si256(a, low_bits)));
    _mm256_storeu_si256(to + 1, lookup<kLevel>(table, b, _mm256_and_si256(b, low_bits)));
  }
}

void expand_s8_afp_avx2(const uint8_t* src, size_t num_tiles, unsigned bits, const int8_t* table,
                        int8_t* dst) {
  static constexpr decltype(&expand_s8<2>) kExpand[] = {expand_s8<2>, expand_s8<3>, expand_s8<4>,
                                                        expand_s8<5>, expand_s8<6>, expand_s8<7>,
                                                        expand_s8<8>};
  kExpand[bits - 2](src, num_tiles, table, dst);
}

// Words of tables that fit bytes: even bytes and odd bytes, with their signs.
template <unsigned kBits>
void expand_s16_bytes(const uint8_t* __restrict src, size_t num_tiles,
                      const int8_t* __restrict table, int16_t* __restrict dst) {
  constexpr int kLevel = kBits <= 4 ? 0 : static_cast<int>(kBits) - 4;
  const __m256i low_bits = _mm256_set1_epi8(15);
  const auto expand_half = [&](__m256i code, int16_t* to) {
    const __m256i bytes = lookup<kLevel>(table, code, _mm256_and_si256(code, low_bits));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * kTileN), _mm256_srai_epi16(bytes, 8));
  };
  const size_t ahead = num_tiles * 8 * kBits;
  for (size_t tile = 0; tile < num_tiles; ++tile, src += 8 * kBits, dst += kTileCodes) {
    prefetch(src + ahead);
    expand_half(cut_half_pairs<kBits, 0>(src), dst);
    expand_half(cut_half_pairs<kBits, 1>(src), dst + kTileN);
  }
}

// Others are looked up byte by byte. Unpacking low and high bytes joins them, once each 128-bit
// lane has the bytes of its 4 channels' steps 0 and 1 before those of steps 2 and 3.
template <unsigned kBits>
void expand_s16(const uint8_t* __restrict src, size_t num_tiles, const int16_t* __restrict table,
                int16_t* __restrict dst) {
  constexpr int kLevel = kBits <= 4 ? 0 : static_cast<int>(kBits) - 4;
  int8_t low[16 << kLevel], high[16 << kLevel];
  bool fits_bytes = true;
  for (size_t i = 0; i < sizeof(low); ++i) {
    low[i] = static_cast<int8_t>(table[i] & 255);
    high[i] = static_cast<int8_t>(table[i] >> 8);
    fits_bytes &= table[i] == low[i];
  }
  if (fits_bytes) return expand_s16_bytes<kBits>(src, num_tiles, low, dst);
  const __m256i low_bits = _mm256_set1_epi8(15);
  const __m256i by_pairs = _mm256_broadcastsi128_si256(
      _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0));
  const auto expand_half = [&](__m256i codes, int16_t* to) {
    const __m256i code = _mm256_shuffle_epi8(codes, by_pairs);
    const __m256i bits = _mm256_and_si256(code, low_bits);
    const __m256i l = lookup<kLevel>(low, code, bits), h = lookup<kLevel>(high, code, bits);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi8(l, h));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * kTileN), _mm256_unpackhi_epi8(l, h));
  };
  const size_t ahead = num_tiles * 8 * kBits;
  for (size_t tile = 0; tile < num_tiles; ++tile, src += 8 * kBits, dst += kTileCodes) {
    prefetch(src + ahead);
    expand_half(cut_half<kBits, 0>(src), dst);
    expand_half(cut_half<kBits, 1>(src), dst + kTileN);
  }
}

void expand_s16_afp_avx2(const uint8_t* src, size_t num_tiles, unsigned bits, const int16_t* table,
                         int16_t* dst) {
  static constexpr decltype(&expand_s16<2>) kExpand[] = {
      expand_s16<2>, expand_s16<3>, expand_s16<4>, expand_s16<5>,
      expand_s16<6>, expand_s16<7>, expand_s16<8>};
  kExpand[bits - 2](src, num_tiles, table, dst);
}

// Byte j of dword c has the code of (channel c, step j).
template <unsigned kBits>
void expand_f32(const uint8_t* __restrict src, size_t num_tiles, const float* __restrict table,
                float* __restrict dst) {
  const __m256i byte = _mm256_set1_epi32(255);
  for (size_t tile = 0; tile < num_tiles; ++tile, src += 8 * kBits, dst += kTileCodes) {
    __m256i a = cut_half<kBits, 0>(src), b = cut_half<kBits, 1>(src);
    for (size_t j = 0; j < kTileK; ++j) {
      _mm256_storeu_ps(dst + j * kTileN, _mm256_i32gather_ps(table, _mm256_and_si256(a, byte), 4));
      _mm256_storeu_ps(dst + j * kTileN + kLanes,
                       _mm256_i32gather_ps(table, _mm256_and_si256(b, byte), 4));
      a = _mm256_srli_epi32(a, 8);
      b = _mm256_srli_epi32(b, 8);
    }
  }
}

void expand_f32_afp_avx2(const uint8_t* src, size_t num_tiles, unsigned bits, const float* table,
                         float* dst) {
  static constexpr decltype(&expand_f32<2>) kExpand[] = {
      expand_f32<2>, expand_f32<3>, expand_f32<4>, expand_f32<5>,
      expand_f32<6>, expand_f32<7>, expand_f32<8>};
  kExpand[bits - 2](src, num_tiles, table, dst);
}

#include "avx2_gemm.inc"
#include "avx2_pixels.inc"
#include "avx2_planar.inc"
#include "avx2_quantize.inc"
#include "avx2_transpose.inc"

// Behind the parts that it uses.
#include "avx2_bytes.inc"

struct Range {
  __m256i above = _mm256_setzero_si256();
  __m256i below = _mm256_setzero_si256();

  [[gnu::always_inline]] void add(__m256i bits) {
    above = _mm256_max_epi32(above, bits);
    below = _mm256_max_epu32(below, bits);
  }
};

void range_f32_avx2(const float* src, size_t count, AfpqRange* range) {
  Range a, b;
  size_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    a.add(_mm256_castps_si256(_mm256_loadu_ps(src + i)));
    b.add(_mm256_castps_si256(_mm256_loadu_ps(src + i + kLanes)));
  }
  for (; i < count; i += kLanes) a.add(_mm256_castps_si256(load(src + i, count - i)));
  int32_t above[kLanes];
  uint32_t below[kLanes];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(above), _mm256_max_epi32(a.above, b.above));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(below), _mm256_max_epu32(a.below, b.below));
  *range = {0, 0};
  for (i = 0; i < kLanes; ++i) {
    if (above[i] > range->above) range->above = above[i];
    if (below[i] > range->below) range->below = below[i];
  }
}

// P[q] of arguments.h for up to 8 channels from c.
template <int kLhsPlanes>
[[gnu::always_inline]] inline __m256 plane_sum(const AfpqCombine& args, int q, size_t r, size_t c) {
  const size_t count = args.num_channels - c;
  const __m256i columns = load(args.column_sums[q] + c, count);
  const int32_t* row = args.sums[q] + r * kLhsPlanes * kPanelN + c;
  const int32_t zero_point = args.zero_points[r];
  const auto shifted = [&](const int32_t* sums, int32_t part) {
    const __m256i shift = _mm256_mullo_epi32(_mm256_set1_epi32(part), columns);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(load(sums, count), shift));
  };
  if constexpr (kLhsPlanes == 1) return shifted(row, zero_point);
  return _mm256_fmadd_ps(shifted(row, zero_point >> 8), _mm256_set1_ps(256.0f),
                         shifted(row + kPanelN, zero_point & 255));
}

template <int kLhsPlanes, int kRhsPlanes>
void combine(const AfpqCombine& args) {
  for (size_t r = 0; r < args.num_rows; ++r) {
    for (size_t c = 0; c < args.num_channels; c += kLanes) {
      const size_t count = args.num_channels - c;
      float* dst = args.dst + r * kPanelN + c;
      const __m256 scale = load(args.scales + c, count);
      __m256 value = plane_sum<kLhsPlanes>(args, 0, r, c);
      if constexpr (kRhsPlanes == 2) {
        value =
            _mm256_fmadd_ps(plane_sum<kLhsPlanes>(args, 1, r, c), _mm256_set1_ps(256.0f), value);
      }
      store(dst, count,
            args.accumulate ? _mm256_fmadd_ps(value, scale, load(dst, count))
                            : _mm256_mul_ps(value, scale));
    }
  }
}

void combine_f32_s32_avx2(const AfpqCombine* args) {
  const bool one = args->rhs_planes == 1;
  const auto run = args->lhs_planes == 1 ? (one ? combine<1, 1> : combine<1, 2>)
                                         : (one ? combine<2, 1> : combine<2, 2>);
  run(*args);
}

void finish_f32_s32_avx2(const AfpqFinishFloats* args) {
  afpq_finish_floats(args, combine_f32_s32_avx2, store_f32_avx2);
}

void gemm_s32_u8_afp_avx2(const uint8_t* const* lhs, size_t num_rows, const uint8_t* src,
                          size_t num_tiles, unsigned bits, const int8_t* table, int accumulate,
                          int32_t* dst) {
  afpq_multiply_codes(lhs, num_rows, src, num_tiles, bits, table, accumulate, dst,
                      expand_s8_afp_avx2, gemm_s32_u8_s8_avx2);
}

}  // namespace

const AfpqKernels kAfpqKernelsAvx2 = {
    "avx2",
    1,
    64,
    0,
    8,
    expand_s8_afp_avx2,
    expand_s16_afp_avx2,
    expand_f32_afp_avx2,
    gemm_s32_u8_s8_avx2,
    gemm_s32_u8_afp_avx2,
    gemm_s32_s16_s16_avx2,
    depthwise_s32_u8_s16_avx2,
    gemm_f32_f32_f32_avx2,
    gemm_pixels_f32_u8_s8_avx2,
    gemm_pixels_f32_s16_s16_avx2,
    range_f32_avx2,
    quantize_u8_f32_avx2,
    quantize_s16_f32_avx2,
    quantize_transpose_u8_f32_avx2,
    quantize_transpose_s16_f32_avx2,
    quantize_pixels_u8_f32_avx2,
    quantize_pixels_s16_f32_avx2,
    transpose_f32_avx2,
    combine_f32_s32_avx2,
    store_f32_avx2,
    finish_f32_s32_avx2,
    store_u8_f32_avx2,
    finish_u8_s32_avx2,
    add_clamp_f32_avx2,
    pick_f32_avx2,
    planar_f32_avx2,
    planar_rows_f32_avx2,
    depthwise_f32_avx2,
};
