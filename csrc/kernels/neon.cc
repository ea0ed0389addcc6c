// The kernel table for 64-bit Arm with dot products of bytes (Armv8.2 with FEAT_DotProd). Ends go
// through short copies, so nothing is read or written beyond what kernels.h documents.
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#include "compose.h"
#include "kernels.h"

namespace {

constexpr size_t kLanes = 4;

[[gnu::always_inline]] inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

[[gnu::always_inline]] inline void copy_bytes(void* dst, const void* src, size_t count) {
  uint8_t* to = static_cast<uint8_t*>(dst);
  const uint8_t* from = static_cast<const uint8_t*>(src);
  for (size_t i = 0; i < count; ++i) to[i] = from[i];
}

// Vectors of up to 4 elements; those beyond `count` are zero or not written.
[[gnu::always_inline]] inline float32x4_t load(const float* src, size_t count) {
  if (count >= kLanes) return vld1q_f32(src);
  float part[kLanes] = {};
  for (size_t i = 0; i < count; ++i) part[i] = src[i];
  return vld1q_f32(part);
}
[[gnu::always_inline]] inline int32x4_t load(const int32_t* src, size_t count) {
  if (count >= kLanes) return vld1q_s32(src);
  int32_t part[kLanes] = {};
  for (size_t i = 0; i < count; ++i) part[i] = src[i];
  return vld1q_s32(part);
}
[[gnu::always_inline]] inline void store(float* dst, size_t count, float32x4_t value) {
  if (count >= kLanes) return vst1q_f32(dst, value);
  float part[kLanes];
  vst1q_f32(part, value);
  for (size_t i = 0; i < count; ++i) dst[i] = part[i];
}
[[gnu::always_inline]] inline void store_bytes(void* dst, size_t count, uint8x16_t value) {
  if (count >= 16) return vst1q_u8(static_cast<uint8_t*>(dst), value);
  uint8_t part[16];
  vst1q_u8(part, value);
  copy_bytes(dst, part, count);
}

// Selections, since fmin and fmax of Arm order zeros and pass NaN on: the value stays when it is
// NaN, and of two zeros too, as in the reference.
[[gnu::always_inline]] inline float32x4_t at_least(float32x4_t value, float32x4_t low) {
  return vbslq_f32(vcgtq_f32(low, value), low, value);
}
[[gnu::always_inline]] inline float32x4_t at_most(float32x4_t value, float32x4_t high) {
  return vbslq_f32(vcltq_f32(high, value), high, value);
}
[[gnu::always_inline]] inline float32x4_t clamp(float32x4_t value, float32x4_t low,
                                                float32x4_t high) {
  return at_most(at_least(value, low), high);
}

// sum - factor * columns as float; the steps wrap around, the result fits.
[[gnu::always_inline]] inline float32x4_t shifted(int32x4_t sum, int32_t factor,
                                                  int32x4_t columns) {
  const uint32x4_t result = vmlsq_n_u32(vreinterpretq_u32_s32(sum), vreinterpretq_u32_s32(columns),
                                        static_cast<uint32_t>(factor));
  return vcvtq_f32_s32(vreinterpretq_s32_u32(result));
}

// Cuts 16 codes, those of 4 channels, into bytes: one lookup brings the byte in which a code
// begins, another the one in which it ends, and shifts join them. Bits above a code are those of
// its neighbour or 0.
template <unsigned kBits, unsigned kQuarter>
struct Cutter {
  // Where the codes begin, and from where 16 bytes end with the tile at the latest.
  static constexpr unsigned kBegin = kQuarter * 2 * kBits;
  static constexpr unsigned kAt = kBegin < 8 * kBits - 16 ? kBegin : 8 * kBits - 16;

  struct Indices {
    uint8_t first[16], second[16];
    int8_t down[16], up[16];  // shifts to the left
  };
  static constexpr Indices make_indices() {
    Indices result = {};
    for (unsigned i = 0; i < 16; ++i) {
      const unsigned byte = kBegin - kAt + i * kBits / 8, shift = i * kBits % 8;
      result.first[i] = static_cast<uint8_t>(byte);
      result.second[i] = static_cast<uint8_t>(shift + kBits > 8 ? byte + 1 : 255);  // 255: none
      result.down[i] = static_cast<int8_t>(-static_cast<int>(shift));
      result.up[i] = static_cast<int8_t>(8 - shift);
    }
    return result;
  }
  static constexpr Indices kIndices = make_indices();

  [[gnu::always_inline]] static uint8x16_t cut(const uint8_t* tile) {
    const uint8x16_t bytes = vld1q_u8(tile + kAt);
    const uint8x16_t first =
        vshlq_u8(vqtbl1q_u8(bytes, vld1q_u8(kIndices.first)), vld1q_s8(kIndices.down));
    if constexpr (8 % kBits == 0) return first;
    return vorrq_u8(first,
                    vshlq_u8(vqtbl1q_u8(bytes, vld1q_u8(kIndices.second)), vld1q_s8(kIndices.up)));
  }
};

// Entries of a table of 2^kBits bytes, at least 16, whatever the bits above the code are.
template <unsigned kBits>
struct Lookup {
  static constexpr unsigned kVectors = kBits <= 4 ? 1 : 1u << (kBits - 4);
  int8x16x4_t entries[(kVectors + 3) / 4] = {};

  explicit Lookup(const int8_t* table) {
    for (unsigned i = 0; i < kVectors; ++i) entries[i / 4].val[i % 4] = vld1q_s8(table + 16 * i);
  }

  [[gnu::always_inline]] int8x16_t operator()(uint8x16_t window) const {
    const uint8x16_t code = vandq_u8(window, vdupq_n_u8(static_cast<uint8_t>(16 * kVectors - 1)));
    if constexpr (kVectors == 1) return vqtbl1q_s8(entries[0].val[0], code);
    if constexpr (kVectors == 2)
      return vqtbl2q_s8(int8x16x2_t{{entries[0].val[0], entries[0].val[1]}}, code);
    int8x16_t result = vqtbl4q_s8(entries[0], code);
#pragma GCC unroll 4
    for (unsigned i = 1; i < kVectors / 4; ++i) {  // indices beyond 63 keep what is there
      const uint8x16_t index = vsubq_u8(code, vdupq_n_u8(static_cast<uint8_t>(64 * i)));
      result = vqtbx4q_s8(result, entries[i], index);
    }
    return result;
  }
};

// put(first code, codes) for each 16 codes of a tile.
template <unsigned kBits, typename Put>
[[gnu::always_inline]] inline void cut_tile(const uint8_t* tile, const Put& put) {
  put(size_t{0}, Cutter<kBits, 0>::cut(tile));
  put(size_t{16}, Cutter<kBits, 1>::cut(tile));
  put(size_t{32}, Cutter<kBits, 2>::cut(tile));
  put(size_t{48}, Cutter<kBits, 3>::cut(tile));
}

template <unsigned kBits>
void expand_s8(const uint8_t* src, size_t num_tiles, const int8_t* table, int8_t* dst) {
  const Lookup<kBits> lookup(table);
  for (size_t tile = 0; tile < num_tiles; ++tile, src += 8 * kBits, dst += kTileCodes) {
    cut_tile<kBits>(src, [&](size_t at, uint8x16_t codes) { vst1q_s8(dst + at, lookup(codes)); });
  }
}

void expand_s8_afp_neon(const uint8_t* src, size_t num_tiles, unsigned bits, const int8_t* table,
                        int8_t* dst) {
  static constexpr decltype(&expand_s8<2>) kExpand[] = {expand_s8<2>, expand_s8<3>, expand_s8<4>,
                                                        expand_s8<5>, expand_s8<6>, expand_s8<7>,
                                                        expand_s8<8>};
  kExpand[bits - 2](src, num_tiles, table, dst);
}

// Words are looked up byte by byte and joined; then pairs of steps 0 and 1 part from those of 2
// and 3.
template <unsigned kBits>
void expand_s16(const uint8_t* src, size_t num_tiles, const int16_t* table, int16_t* dst) {
  int8_t bytes[2][16 * Lookup<kBits>::kVectors];
  for (size_t i = 0; i < sizeof(bytes[0]); ++i) {
    bytes[0][i] = static_cast<int8_t>(table[i] & 255);
    bytes[1][i] = static_cast<int8_t>(table[i] >> 8);
  }
  const Lookup<kBits> low(bytes[0]), high(bytes[1]);
  const auto put = [&](size_t at, uint8x16_t codes) {
    const int8x16_t l = low(codes), h = high(codes);
    const int32x4_t a = vreinterpretq_s32_s8(vzip1q_s8(l, h));  // channels 0, 1
    const int32x4_t b = vreinterpretq_s32_s8(vzip2q_s8(l, h));  // channels 2, 3
    int16_t* to = dst + at / kTileK * 2;
    vst1q_s16(to, vreinterpretq_s16_s32(vuzp1q_s32(a, b)));
    vst1q_s16(to + 2 * kTileN, vreinterpretq_s16_s32(vuzp2q_s32(a, b)));
  };
  for (size_t tile = 0; tile < num_tiles; ++tile, src += 8 * kBits, dst += kTileCodes)
    cut_tile<kBits>(src, put);
}

void expand_s16_afp_neon(const uint8_t* src, size_t num_tiles, unsigned bits, const int16_t* table,
                         int16_t* dst) {
  static constexpr decltype(&expand_s16<2>) kExpand[] = {
      expand_s16<2>, expand_s16<3>, expand_s16<4>, expand_s16<5>,
      expand_s16<6>, expand_s16<7>, expand_s16<8>};
  kExpand[bits - 2](src, num_tiles, table, dst);
}

template <unsigned kBits>
void expand_f32(const uint8_t* src, size_t num_tiles, const float* table, float* dst) {
  for (size_t tile = 0; tile < num_tiles; ++tile, src += 8 * kBits, dst += kTileCodes) {
    uint8_t codes[kTileCodes];
    cut_tile<kBits>(src, [&](size_t at, uint8x16_t part) { vst1q_u8(codes + at, part); });
    for (size_t i = 0; i < kTileCodes; ++i) dst[i % kTileK * kTileN + i / kTileK] = table[codes[i]];
  }
}

void expand_f32_afp_neon(const uint8_t* src, size_t num_tiles, unsigned bits, const float* table,
                         float* dst) {
  static constexpr decltype(&expand_f32<2>) kExpand[] = {
      expand_f32<2>, expand_f32<3>, expand_f32<4>, expand_f32<5>,
      expand_f32<6>, expand_f32<7>, expand_f32<8>};
  kExpand[bits - 2](src, num_tiles, table, dst);
}

void range_f32_neon(const float* src, size_t count, AfpqRange* range) {
  int32x4_t above = vdupq_n_s32(0);
  uint32x4_t below = vdupq_n_u32(0);
  for (size_t i = 0; i < count; i += kLanes) {
    const float32x4_t value = load(src + i, count - i);
    above = vmaxq_s32(above, vreinterpretq_s32_f32(value));
    below = vmaxq_u32(below, vreinterpretq_u32_f32(value));
  }
  range->above = vmaxvq_s32(above);
  range->below = vmaxvq_u32(below);
}

#include "neon_gemm.inc"
#include "neon_pixels.inc"
#include "neon_planar.inc"
#include "neon_quantize.inc"

// Behind the parts that it uses.
#include "neon_store.inc"

void finish_f32_s32_neon(const AfpqFinishFloats* args) {
  afpq_finish_floats(args, combine_f32_s32_neon, store_f32_neon);
}

void gemm_s32_u8_afp_neon(const uint8_t* const* lhs, size_t num_rows, const uint8_t* src,
                          size_t num_tiles, unsigned bits, const int8_t* table, int accumulate,
                          int32_t* dst) {
  afpq_multiply_codes(lhs, num_rows, src, num_tiles, bits, table, accumulate, dst,
                      expand_s8_afp_neon, gemm_s32_u8_s8_neon);
}

}  // namespace

const AfpqKernels kAfpqKernelsNeon = {
    "neon",
    0,
    128,
    0,
    0,
    expand_s8_afp_neon,
    expand_s16_afp_neon,
    expand_f32_afp_neon,
    gemm_s32_u8_s8_neon,
    gemm_s32_u8_afp_neon,
    gemm_s32_s16_s16_neon,
    depthwise_s32_u8_s16_neon,
    gemm_f32_f32_f32_neon,
    gemm_pixels_f32_u8_s8_neon,
    gemm_pixels_f32_s16_s16_neon,
    range_f32_neon,
    quantize_u8_f32_neon,
    quantize_s16_f32_neon,
    quantize_transpose_u8_f32_neon,
    quantize_transpose_s16_f32_neon,
    quantize_pixels_u8_f32_neon,
    quantize_pixels_s16_f32_neon,
    transpose_f32_neon,
    combine_f32_s32_neon,
    store_f32_neon,
    finish_f32_s32_neon,
    store_u8_f32_neon,
    finish_u8_s32_neon,
    add_clamp_f32_neon,
    pick_f32_neon,
    planar_f32_neon,
    planar_rows_f32_neon,
    depthwise_f32_neon,
};
