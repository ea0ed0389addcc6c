// The scalar kernel table: the reference in C++. Plain loops over the definitions in kernels.h and
// arguments.h, for any processor.
#include <math.h>
#include <string.h>

#include "compose.h"
#include "kernels.h"

namespace {

// The 8-bit window at code `index` of a stream; the bits above the code may be missing at the end
// of the stream.
unsigned window(const uint8_t* src, size_t index, unsigned bits) {
  const size_t bit = index * bits;
  const unsigned shift = bit % 8;
  unsigned word = src[bit / 8];
  if (shift + bits > 8) word |= static_cast<unsigned>(src[bit / 8 + 1]) << 8;
  return (word >> shift) & 255;
}

void expand_s8_afp_scalar(const uint8_t* src, size_t num_tiles, unsigned bits, const int8_t* table,
                          int8_t* dst) {
  for (size_t i = 0; i < num_tiles * kTileCodes; ++i) dst[i] = table[window(src, i, bits)];
}

void expand_s16_afp_scalar(const uint8_t* src, size_t num_tiles, unsigned bits,
                           const int16_t* table, int16_t* dst) {
  for (size_t tile = 0; tile < num_tiles; ++tile) {
    for (size_t c = 0; c < kTileN; ++c) {
      for (size_t j = 0; j < kTileK; ++j) {
        dst[(j / 2 * kTileN + c) * 2 + j % 2] = table[window(src, c * kTileK + j, bits)];
      }
    }
    src += 8 * bits;
    dst += kTileCodes;
  }
}

void expand_f32_afp_scalar(const uint8_t* src, size_t num_tiles, unsigned bits, const float* table,
                           float* dst) {
  for (size_t tile = 0; tile < num_tiles; ++tile) {
    for (size_t c = 0; c < kTileN; ++c) {
      for (size_t j = 0; j < kTileK; ++j)
        dst[j * kTileN + c] = table[window(src, c * kTileK + j, bits)];
    }
    src += 8 * bits;
    dst += kTileCodes;
  }
}

void gemm_s32_u8_s8_scalar(const uint8_t* const* lhs, size_t num_taps, size_t num_tiles,
                           const int8_t* rhs, size_t rhs_tiles, size_t num_rows, size_t num_blocks,
                           int /*limit*/, int accumulate, AfpqAhead /*ahead*/, int32_t* dst) {
  for (size_t r = 0; r < num_rows; ++r) {
    for (size_t b = 0; b < num_blocks; ++b) {
      int32_t* out = dst + r * kPanelN + b * kTileN;
      int32_t sums[kTileN];
      for (size_t c = 0; c < kTileN; ++c) sums[c] = accumulate ? out[c] : 0;
      const int8_t* tile = rhs + b * rhs_tiles * kTileCodes;
      for (size_t t = 0; t < num_taps; ++t) {
        const uint8_t* row = lhs[(r / kMaxRows * num_taps + t) * kMaxRows + r % kMaxRows];
        for (size_t i = 0; i < num_tiles; ++i, tile += kTileCodes) {
          for (size_t c = 0; c < kTileN; ++c) {
            for (size_t j = 0; j < kTileK; ++j)
              sums[c] += row[i * kTileK + j] * tile[c * kTileK + j];
          }
        }
      }
      for (size_t c = 0; c < kTileN; ++c) out[c] = sums[c];
    }
  }
}

void gemm_s32_s16_s16_scalar(const int16_t* const* lhs, size_t num_taps, size_t num_tiles,
                             const int16_t* rhs, size_t rhs_tiles, size_t num_rows,
                             size_t num_blocks, int accumulate, int32_t* dst) {
  for (size_t r = 0; r < num_rows; ++r) {
    for (size_t b = 0; b < num_blocks; ++b) {
      int32_t* out = dst + r * kPanelN + b * kTileN;
      uint32_t sums[kTileN];
      for (size_t c = 0; c < kTileN; ++c) sums[c] = accumulate ? static_cast<uint32_t>(out[c]) : 0;
      const int16_t* pairs = rhs + b * rhs_tiles * kTileCodes;
      for (size_t t = 0; t < num_taps; ++t) {
        const int16_t* row = lhs[(r / kMaxRows * num_taps + t) * kMaxRows + r % kMaxRows];
        for (size_t k = 0; k < num_tiles * kTileK; k += 2, pairs += 2 * kTileN) {
          for (size_t c = 0; c < kTileN; ++c) {
            sums[c] += static_cast<uint32_t>(row[k] * pairs[2 * c]);
            sums[c] += static_cast<uint32_t>(row[k + 1] * pairs[2 * c + 1]);
          }
        }
      }
      for (size_t c = 0; c < kTileN; ++c) out[c] = static_cast<int32_t>(sums[c]);
    }
  }
}

void gemm_f32_f32_f32_scalar(const float* const* lhs, size_t num_taps, size_t num_tiles,
                             const float* rhs, size_t rhs_tiles, size_t num_rows, size_t num_blocks,
                             int accumulate, float* dst) {
  for (size_t r = 0; r < num_rows; ++r) {
    for (size_t b = 0; b < num_blocks; ++b) {
      float* out = dst + r * kPanelN + b * kTileN;
      float sums[kTileN];
      for (size_t c = 0; c < kTileN; ++c) sums[c] = accumulate ? out[c] : 0.0f;
      const float* step = rhs + b * rhs_tiles * kTileCodes;
      for (size_t t = 0; t < num_taps; ++t) {
        const float* row = lhs[(r / kMaxRows * num_taps + t) * kMaxRows + r % kMaxRows];
        for (size_t k = 0; k < num_tiles * kTileK; ++k, step += kTileN) {
          for (size_t c = 0; c < kTileN; ++c) sums[c] = fmaf(row[k], step[c], sums[c]);
        }
      }
      for (size_t c = 0; c < kTileN; ++c) out[c] = sums[c];
    }
  }
}

void range_f32_scalar(const float* src, size_t count, AfpqRange* range) {
  *range = {0, 0};
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, src + i, sizeof bits);
    if (bits > range->below) range->below = bits;
    if (static_cast<int32_t>(bits) > range->above) range->above = static_cast<int32_t>(bits);
  }
}

unsigned quantize_float(float x, const AfpqQuantize& q) {
  const float ratio = x / q.scale;
  const float above = ratio > q.low ? ratio : q.low;
  const float r = above < q.high ? above : q.high;
  const float unit = ldexpf(1.0f, q.mantissa_bits);
  const float magnitude = fabsf(r);
  const float step = magnitude < unit ? 1.0f : ldexpf(1.0f, ilogbf(magnitude) - q.mantissa_bits);
  return static_cast<unsigned>(static_cast<int32_t>(nearbyintf(r / step) * step) + q.zero_point);
}

// q of one element. What int32 cannot hold (NaN too) becomes the smallest int32, as on x86, and so
// 0.
unsigned quantize(float x, const AfpqQuantize& q) {
  if (q.scale > 0) return quantize_float(x, q);
  const float scaled = nearbyintf(x * q.inverse_scale);
  const int32_t highest = q.num_planes == 1 ? 255 : 65535;
  const int32_t rounded = fabsf(scaled) < 2147483648.0f ? static_cast<int32_t>(scaled) : INT32_MIN;
  const int32_t shifted = rounded + q.zero_point;
  return shifted < 0 ? 0 : shifted > highest ? highest : shifted;
}

void put_planes(unsigned value, size_t index, const AfpqQuantize& q) {
  if (q.num_planes == 1) {
    q.planes[0][index] = static_cast<uint8_t>(value);
  } else {
    q.planes[0][index] = static_cast<uint8_t>(value >> 8);
    q.planes[1][index] = static_cast<uint8_t>(value & 255);
  }
}

void quantize_u8_f32_scalar(const float* src, size_t count, const AfpqQuantize* q) {
  for (size_t i = 0; i < count; ++i) put_planes(quantize(src[i], *q), i, *q);
}

void quantize_transpose_u8_f32_scalar(const float* src, size_t src_stride, size_t num_channels,
                                      size_t count, const AfpqQuantize* q) {
  for (size_t x = 0; x < count; ++x) {
    for (size_t c = 0; c < num_channels; ++c) {
      put_planes(quantize(src[c * src_stride + x], *q), x * num_channels + c, *q);
    }
  }
}

int16_t word(float x, const AfpqQuantize& q) {
  const int32_t middle = q.num_planes == 1 ? 0 : 32768;
  return static_cast<int16_t>(static_cast<int32_t>(quantize(x, q)) - middle);
}

void quantize_s16_f32_scalar(const float* src, size_t count, const AfpqQuantize* q) {
  for (size_t i = 0; i < count; ++i) q->words[i] = word(src[i], *q);
}

void quantize_transpose_s16_f32_scalar(const float* src, size_t src_stride, size_t num_channels,
                                       size_t count, const AfpqQuantize* q) {
  for (size_t x = 0; x < count; ++x) {
    for (size_t c = 0; c < num_channels; ++c) {
      q->words[x * num_channels + c] = word(src[c * src_stride + x], *q);
    }
  }
}

// put(c, i, value): of pixel i of a group.
template <typename Put>
void each_pixel(const AfpqPixelSource& s, const Put& put) {
  for (size_t c = 0; c < s.num_channels; ++c) {
    for (size_t r = 0; r < s.num_rows; ++r) {
      const float* row = s.src + c * s.src_stride + r * s.row_size;
      for (size_t x = 0; x < s.row_size; ++x) put(c, r * s.row_pitch + x, row[x]);
    }
  }
}

void quantize_pixels_u8_f32_scalar(const AfpqPixelSource* s, const AfpqQuantize* q) {
  each_pixel(*s, [&](size_t c, size_t i, float value) {
    put_planes(quantize(value, *q), 4 * (c / 4 * s->pixel_stride + i) + c % 4, *q);
  });
}

void quantize_pixels_s16_f32_scalar(const AfpqPixelSource* s, const AfpqQuantize* q) {
  each_pixel(*s, [&](size_t c, size_t i, float value) {
    q->words[2 * (c / 2 * s->pixel_stride + i) + c % 2] = word(value, *q);
  });
}

void transpose_f32_scalar(const float* src, size_t src_stride, size_t num_channels, size_t count,
                          float* dst) {
  for (size_t x = 0; x < count; ++x) {
    for (size_t c = 0; c < num_channels; ++c) dst[x * num_channels + c] = src[c * src_stride + x];
  }
}

// S[q][p] of arguments.h as float. Unsigned arithmetic wraps where a step, not the result, would
// leave int32.
float shifted_sum(const AfpqCombine& args, int q, int p, size_t r, size_t c) {
  const int32_t zero_point = args.zero_points[r];
  const int32_t part = args.lhs_planes == 1 ? zero_point
                       : p == 0             ? zero_point >> 8
                                            : zero_point & 255;
  const uint32_t sum = static_cast<uint32_t>(args.sums[q][(r * args.lhs_planes + p) * kPanelN + c]);
  const uint32_t shift =
      static_cast<uint32_t>(part) * static_cast<uint32_t>(args.column_sums[q][c]);
  return static_cast<float>(static_cast<int32_t>(sum - shift));
}

float plane_sum(const AfpqCombine& args, int q, size_t r, size_t c) {
  const float first = shifted_sum(args, q, 0, r, c);
  return args.lhs_planes == 1 ? first : fmaf(first, 256.0f, shifted_sum(args, q, 1, r, c));
}

void combine_f32_s32_scalar(const AfpqCombine* args) {
  for (size_t r = 0; r < args->num_rows; ++r) {
    for (size_t c = 0; c < args->num_channels; ++c) {
      float value = plane_sum(*args, 0, r, c);
      if (args->rhs_planes == 2) value = fmaf(plane_sum(*args, 1, r, c), 256.0f, value);
      float* out = args->dst + r * kPanelN + c;
      *out = args->accumulate ? fmaf(value, args->scales[c], *out) : value * args->scales[c];
    }
  }
}

// Both comparisons are false for NaN, which so stays.
float clamp(float value, float low, float high) {
  value = low > value ? low : value;
  return high < value ? high : value;
}

void store_f32_scalar(const AfpqStore* args) {
  for (size_t r = 0; r < args->num_rows; ++r) {
    for (size_t c = 0; c < args->num_channels; ++c) {
      const float value = fmaf(args->src[r * kPanelN + c], args->row_scales[r], args->bias[c]);
      args->dst[r * args->row_stride + c * args->channel_stride] =
          clamp(value, args->low, args->high);
    }
  }
}

// Behind the functions that it uses.
#include "scalar_bytes.inc"

// F of channel c and pixel x. Element j of group g of a tap: a pixel's at lhs[(taps[t] + g *
// pixel_stride + x) * steps + j]; of group g of all: a channel's at rhs[(g * 16 + c) * steps + j].
template <typename Lhs, typename Rhs>
float pixel_sum(const AfpqPixels& p, const Rhs* rhs, const int32_t* column_sums, size_t c,
                size_t x) {
  constexpr size_t kSteps = 4 / sizeof(Rhs);
  const size_t groups = p.num_tiles * kTileK / kSteps / p.num_taps;
  const Lhs* lhs = static_cast<const Lhs*>(p.lhs);
  uint32_t sum = 0;
  for (size_t i = 0; i < p.num_taps * groups; ++i) {
    const size_t at = p.taps[i / groups] + i % groups * p.pixel_stride + x;
    for (size_t j = 0; j < kSteps; ++j)
      sum += static_cast<uint32_t>(lhs[at * kSteps + j] * rhs[(i * kTileN + c) * kSteps + j]);
  }
  sum -= static_cast<uint32_t>(p.zero_point) * static_cast<uint32_t>(column_sums[c]);
  return static_cast<float>(static_cast<int32_t>(sum));
}

template <typename Lhs, typename Rhs>
void gemm_pixels(const AfpqPixels& p) {
  const Rhs *rhs = static_cast<const Rhs*>(p.rhs), *high = static_cast<const Rhs*>(p.rhs_high);
  for (size_t c = 0; c < p.num_channels; ++c) {
    for (size_t x = 0; x < p.num_pixels; ++x) {
      const size_t row = x / p.row_pitch, column = x % p.row_pitch;
      if (column >= p.row_size) continue;
      float value = pixel_sum<Lhs>(p, rhs, p.column_sums, c, x);
      if (high) value = fmaf(pixel_sum<Lhs>(p, high, p.column_sums_high, c, x), 256.0f, value);
      p.dst[c * p.channel_stride + row * p.row_size + column] =
          clamp(fmaf(value * p.scales[c], p.row_scale, p.bias[c]), p.low, p.high);
    }
  }
}

void gemm_pixels_f32_u8_s8_scalar(const AfpqPixels* p) { gemm_pixels<uint8_t, int8_t>(*p); }
void gemm_pixels_f32_s16_s16_scalar(const AfpqPixels* p) { gemm_pixels<int16_t, int16_t>(*p); }

void add_clamp_f32_scalar(const float* src, size_t stride, size_t num_channels, size_t count,
                          float low, float high, float* dst) {
  for (size_t c = 0; c < num_channels; ++c, src += stride, dst += stride) {
    for (size_t i = 0; i < count; ++i) dst[i] = clamp(dst[i] + src[i], low, high);
  }
}

void pick_f32_scalar(const float* src, size_t src_stride, size_t step, size_t num_rows,
                     size_t count, size_t dst_stride, float* dst) {
  for (size_t r = 0; r < num_rows; ++r) {
    for (size_t i = 0; i < count; ++i) dst[r * dst_stride + i] = src[r * src_stride + i * step];
  }
}

#include "scalar_planar.inc"

void finish_f32_s32_scalar(const AfpqFinishFloats* args) {
  afpq_finish_floats(args, combine_f32_s32_scalar, store_f32_scalar);
}

void gemm_s32_u8_afp_scalar(const uint8_t* const* lhs, size_t num_rows, const uint8_t* src,
                            size_t num_tiles, unsigned bits, const int8_t* table, int accumulate,
                            int32_t* dst) {
  afpq_multiply_codes(lhs, num_rows, src, num_tiles, bits, table, accumulate, dst,
                      expand_s8_afp_scalar, gemm_s32_u8_s8_scalar);
}

}  // namespace

const AfpqKernels kAfpqKernelsScalar = {
    "scalar",
    0,
    128,
    0,
    0,
    expand_s8_afp_scalar,
    expand_s16_afp_scalar,
    expand_f32_afp_scalar,
    gemm_s32_u8_s8_scalar,
    gemm_s32_u8_afp_scalar,
    gemm_s32_s16_s16_scalar,
    depthwise_s32_u8_s16_scalar,
    gemm_f32_f32_f32_scalar,
    gemm_pixels_f32_u8_s8_scalar,
    gemm_pixels_f32_s16_s16_scalar,
    range_f32_scalar,
    quantize_u8_f32_scalar,
    quantize_s16_f32_scalar,
    quantize_transpose_u8_f32_scalar,
    quantize_transpose_s16_f32_scalar,
    quantize_pixels_u8_f32_scalar,
    quantize_pixels_s16_f32_scalar,
    transpose_f32_scalar,
    combine_f32_s32_scalar,
    store_f32_scalar,
    finish_f32_s32_scalar,
    store_u8_f32_scalar,
    finish_u8_s32_scalar,
    add_clamp_f32_scalar,
    pick_f32_scalar,
    planar_f32_scalar,
    planar_rows_f32_scalar,
    depthwise_f32_scalar,
};
