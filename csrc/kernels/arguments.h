// What kernels take: sizes of tiles, and the arguments of those that take many, with what they
// compute.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  kTileN = 16,                      // channels of a tile
  kTileK = 4,                       // steps of k in a tile
  kTileCodes = kTileN * kTileK,     // 64
  kPanelBlocks = 4,                 // at most so many blocks of 16 channels in a panel
  kPanelN = kTileN * kPanelBlocks,  // 64: row stride of every accumulator tile
  kMaxRows = 6,                     // mr: at most so many rows in a register tile
  kMostPixels = 512,                // of a product with pixels in the lanes
};

// Bytes from `begin` to `end`; none if both are null.
typedef struct AfpqAhead {
  const uint8_t* begin;
  const uint8_t* end;
} AfpqAhead;

// The largest of the bits of 0 and some floats, as signed integers and as unsigned ones. Where all
// are finite, `above` is below 0x7f800000 and the largest number, and `below` is below 0xff800000
// and, if beyond 0x80000000, the smallest.
typedef struct AfpqRange {
  int32_t above;
  uint32_t below;
} AfpqRange;

// How sums of one row block become float: dst[r][c] = (accumulate ? dst[r][c] : 0) + scale[c] *
// F[r][c].
//
// Rows of sums are lhs planes: with lhs_planes == 2 (a16 as bytes), row 2r holds the high bytes of
// row r and row 2r + 1 the low ones. With rhs_planes == 2 the integers are 256 * high + low,
// sums[0] belongs to the low plane, sums[1] to the high.
//   S[q][p]  = sums[q][r * lhs_planes + p][c] - zp_p * column_sums[q][c]                exact int32
//              (zp_0 = zero_point >> 8, zp_1 = zero_point & 255 with two lhs planes, zp_0 =
//              zero_point with one)
//   P[q]     = lhs_planes == 2 ? fma((float)S[q][0], 256, (float)S[q][1]) : (float)S[q][0]
//   F        = rhs_planes == 2 ? fma(P[1], 256, P[0]) : P[0]
//   dst      = accumulate ? fma(F, scale[c], dst) : F * scale[c]
typedef struct AfpqCombine {
  const int32_t* sums[2];         // [num_rows * lhs_planes][kPanelN]
  const int32_t* column_sums[2];  // [num_channels]
  const int32_t* zero_points;     // [num_rows], 0..255 or 0..65535; of words: of what they hold
  const float* scales;            // [num_channels]
  float* dst;                     // [num_rows][kPanelN]
  size_t num_rows;
  size_t num_channels;  // 1..kPanelN
  int lhs_planes;       // 1 or 2
  int rhs_planes;       // 1 or 2
  int accumulate;
} AfpqCombine;

// The end of a layer: y[r][c] = clamp(fma(src[r][c], row_scales[r], bias[c])), clamp(v) =
// min(max(v, low), high) with NaN kept. Written as dst[r * row_stride + c * channel_stride]; one of
// the two strides is 1.
typedef struct AfpqStore {
  const float* src;         // [num_rows][kPanelN]
  const float* row_scales;  // [num_rows]
  const float* bias;        // [num_channels]
  float* dst;
  size_t num_rows;
  size_t num_channels;    // 1..kPanelN
  size_t row_stride;      // elements
  size_t channel_stride;  // elements
  float low, high;        // -inf, +inf: no clamp
} AfpqStore;

// Both steps from sums to floats at once: store.src is what combine would write. combine.dst,
// accumulate and store.src are not used; the numbers of rows and channels are store's.
typedef struct AfpqFinishFloats {
  AfpqCombine combine;
  AfpqStore store;
} AfpqFinishFloats;

struct AfpqQuantize;

// The same end of a layer to rows of bytes, or of floats behind which only a change of layout
// follows. With a residual, which is what a byte of another tensor stands for,
//   v = clamp(fma(residual[r][c] - residual_zero, residual_scale,
//                 fma(src[r][c], row_scales[r], bias[c])))
// else v as above. If floats is null, dst takes q of v as `quantize`, which has one plane and a
// scale > 0, says, and of `low` where v is NaN; else floats take v. floats may be src. A scale of
// 1, which drivers give, is the fast one.
typedef struct AfpqStoreBytes {
  const float* src;         // [num_rows][kPanelN]
  const float* row_scales;  // [num_rows]
  const float* bias;        // [num_channels]
  const uint8_t* residual;  // rows `stride` apart, or null
  int32_t residual_zero;
  float residual_scale;
  const struct AfpqQuantize* quantize;
  uint8_t* dst;   // rows `stride` apart
  float* floats;  // [num_rows][kPanelN] or null
  size_t num_rows;
  size_t num_channels;  // 1..kPanelN
  size_t stride;
  float low, high;  // -inf, +inf: no clamp
} AfpqStoreBytes;

// Both steps from sums to bytes at once, where all rows have the first zero point and the first row
// scale: store.src is what combine, with one plane of lhs, would write. combine.dst, accumulate,
// store.src and store.floats are not used; the numbers of rows and channels are store's.
typedef struct AfpqFinish {
  AfpqCombine combine;
  AfpqStoreBytes store;
} AfpqFinish;

// How floats become unsigned bytes. With scale == 0, fixed point: q = min(max(rint(x *
// inverse_scale) + zero_point, 0), num_planes == 1 ? 255 : 65535), rint to nearest even; q = 0
// where x * inverse_scale is NaN or beyond +-65536 (rows with such elements have a NaN scale).
// Plane 0 takes q (one plane) or q >> 8, plane 1 takes q & 255. zero_point is in the range of q.
// Functions that make words write q (one plane) or q - 32768 (two) to `words` instead, and anything
// where q would be 0 for want of a number.
//
// With scale > 0, one plane takes the codes' integers of a float format (afpq/formats.py):
//   r = min(max(x / scale, low), high)                                   NaN becomes low
//   step = max(2^floor(log2|r|), 2^mantissa_bits) / 2^mantissa_bits      1 up to the second binade
//   q = rint(r / step) * step + zero_point
// A scale of 8 significant bits makes this `encode` to the last tie: a midpoint m has 9, so m *
// scale is a float, and x / scale is rounded to m only if x is m * scale.
typedef struct AfpqQuantize {
  float inverse_scale;
  int32_t zero_point;  // 0..255 or 0..65535; low + zero_point and high + zero_point are bytes
  int num_planes;      // 1 or 2
  uint8_t* planes[2];
  int16_t* words;
  float scale;
  float low, high;    // the least and the largest integer of the format
  int mantissa_bits;  // 1..7: from 1 on, the even one of two codes is the one with the even
                      // mantissa
} AfpqQuantize;

// Rows of pixels of channel planes, one row behind the other, and where they become dwords: row r
// begins at pixel r * row_pitch.
typedef struct AfpqPixelSource {
  const float* src;
  size_t src_stride;    // elements from channel to channel
  size_t num_channels;  // a multiple of 4
  size_t num_rows, row_size;
  size_t row_pitch;     // at least row_size
  size_t pixel_stride;  // pixels from group to group
} AfpqPixelSource;

// A product with pixels in the lanes, which makes planes of floats without transposing anything:
//   S[c][x] = sum over groups g of (steps of group g of pixel x) * (those of channel c)
//   dst[c * channel_stride + at(x)] =
//       clamp(fma((float)(S[c][x] - zero_point * column_sums[c]) * scales[c], row_scale, bias[c]))
// Sums are modulo 2^32. A group is the 4 bytes of 4 steps or of 2 words. The sums fit int32 once
// the zero point is out. Words with a second plane of weights have S, and a float F, of each, and
// fma(F_high, 256, F_low) is scaled. Pixels come in rows of row_pitch, of which row_size are
// written, one row behind the other: at(x) = x / row_pitch * row_size + x % row_pitch, where that
// remainder is below row_size.
typedef struct AfpqPixels {
  // Group g of tap t of pixel x lies at 4 bytes * (taps[t] + g * pixel_stride + x), as
  // quantize_pixels writes it. Behind the last pixel, what fills a vector of 16 can be read.
  const void* lhs;
  const size_t* taps;
  size_t num_taps;  // of as many groups each
  size_t pixel_stride;
  // [num_tiles] of one block of 16 channels, as expand_s8_afp or expand_s16_afp, from the first of
  // these channels on.
  const void* rhs;
  const void* rhs_high;  // the same of the high plane, or null
  size_t num_tiles;      // of all taps, num_taps divides it
  size_t num_pixels;     // 1..kMostPixels
  size_t row_pitch;
  size_t row_size;      // 1..row_pitch
  size_t num_channels;  // 1..16
  int limit;            // of |rhs| if bytes, at most a8_byte_limit
  int32_t zero_point;
  const int32_t* column_sums;       // [num_channels]
  const int32_t* column_sums_high;  // [num_channels] with rhs_high
  const float* scales;              // [num_channels]
  const float* bias;                // [num_channels]
  float row_scale;
  float low, high;  // -inf, +inf: no clamp
  float* dst;
  size_t channel_stride;  // elements
} AfpqPixels;

// Rows of some channels of a depthwise (or small grouped) convolution, straight from float planes.
// Tap t of output (y, x) of channel c is row y * row_step + taps[t].row, column x * column_step +
// taps[t].column of the plane that begins at src + c * src_channel_stride + taps[t].plane; it is 0
// outside the plane.
//   dst[c * dst_channel_stride + y * dst_stride + x] = clamp(fma(a, scales[c], bias[c])), a = chain
//   of fma(tap t, weights[t * kTileN + c]) over t, from 0
// Weights are integers, so that taps that are 0 may be left out.
typedef struct AfpqTap {
  size_t plane;  // elements
  ptrdiff_t row, column;
} AfpqTap;
typedef struct AfpqPlanar {
  const float* src;
  const AfpqTap* taps;
  const float* weights;  // [num_taps][kTileN], of which num_channels are used
  const float* scales;   // [num_channels]
  const float* bias;     // [num_channels]
  float* dst;
  size_t num_taps;
  size_t num_channels;           // 1..kTileN
  size_t src_channel_stride;     // elements; 0: all channels read the same planes
  size_t dst_channel_stride;     // elements
  size_t src_rows, src_columns;  // of every plane
  size_t src_stride;             // elements from row to row
  size_t row_step, column_step;
  size_t num_rows;
  size_t row_size;    // elements
  size_t dst_stride;  // at least row_size
  float low, high;    // -inf, +inf: no clamp
} AfpqPlanar;

// The same sums of channels that all read the same planes, from planes without padding to rows:
// with channels in the lanes, nothing needs to be transposed.
//   dst[i * kPanelN + c] = fma(a, scales[c], bias[c]), a = chain of fma(src[taps[t] + pixels[i]],
//   weights[(c / kTileN * num_tiles * kTileK + t) * kTileN + c % kTileN]) over t, from 0
typedef struct AfpqPlanarRows {
  const float* src;
  const size_t* taps;    // elements
  const size_t* pixels;  // [num_pixels], elements
  const float* weights;  // of whole blocks, as expand_f32_afp writes them
  const float* scales;   // [num_channels]
  const float* bias;     // [num_channels]
  float* dst;            // [num_pixels][kPanelN]
  size_t num_taps;       // up to num_tiles * kTileK
  size_t num_tiles;
  size_t num_pixels;
  size_t num_channels;  // 1..kPanelN
} AfpqPlanarRows;

// Depthwise with channels in the lanes: 16 channels lie together, with padding around their planes.
//   dst[y][x][c] = clamp(fma(a, scales[c], bias[c])), a = chain of fma(src[taps[t] + y * line_step
//   + x * step + c], weights[t][c]) over t, from 0
typedef struct AfpqDepthwise {
  const float* src;
  const size_t* taps;    // elements
  const float* weights;  // [num_taps][kTileN]
  const float* scales;   // [kTileN]
  const float* bias;     // [kTileN]
  float* dst;            // [num_lines][num_columns][kTileN]
  size_t num_taps;
  size_t step, line_step;  // elements from output to output
  size_t num_lines, num_columns;
  float low, high;  // -inf, +inf: no clamp
} AfpqDepthwise;

#ifdef __cplusplus
}
#endif
