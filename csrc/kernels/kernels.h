// The contract between drivers and instruction sets: one table of functions per ISA, none of them
// null.
//
// Every function is stateless, allocates nothing, starts no thread and may be called for any
// portion of the work. Integer results are exact; float results follow one recipe (fused
// multiply-add, round to nearest even, one accumulator per output in k order), so every table gives
// the same bits. Pointers need no alignment. A function reads and writes exactly the elements it
// documents, never beyond. ISA files include only intrinsics, <stddef.h>, <stdint.h>, this header
// and parts of their own. Layout of packed tiles: afpq/packing.py.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "arguments.h"

#ifdef __cplusplus
extern "C" {
#endif

// Products of integers come in two forms that give the same bits where both may be used:
//   bytes  rows of lhs are planes of unsigned bytes, those of rhs of signed bytes
//   words  both are 16-bit numbers, so a16 takes one dot product instead of two; the sums must fit
//          32 bits (csrc/drivers/weight.h says when they do)
typedef struct AfpqKernels {
  const char* isa;
  // Preferences, where several ways give the same bits.
  int a16_as_words;   // a16 is faster as words
  int a8_byte_limit;  // a8 is faster as words where |rhs| goes beyond this
  int code_rows;      // up to so many rows of bytes are faster by gemm_s32_u8_afp
  int pixel_lanes;    // of convolutions that are faster with pixels in the lanes (gemm_pixels): how
                      // many go together, or 0

  // Codes -> signed bytes, one per code in stored order: dst[i] = table[window of 8 bits starting
  // at code i's bits]. The table has 256 entries and is periodic in 2^bits, so bits above the code
  // do not matter. src: [num_tiles][8 * bits] bytes; dst: [num_tiles][64]; bits: 2..8.
  void (*expand_s8_afp)(const uint8_t* src, size_t num_tiles, unsigned bits, const int8_t* table,
                        int8_t* dst);

  // The same to words, the channels of two steps together: dst[tile][i][c][j] = table[code of
  // (channel c, step 2 i + j)], i < 2, j < 2.
  void (*expand_s16_afp)(const uint8_t* src, size_t num_tiles, unsigned bits, const int16_t* table,
                         int16_t* dst);

  // The same to floats, transposed inside the tile: dst[tile][j][c] = table[code of (channel c,
  // step j)]. dst: [num_tiles][kTileK][kTileN] floats.
  void (*expand_f32_afp)(const uint8_t* src, size_t num_tiles, unsigned bits, const float* table,
                         float* dst);

  // dst[r][16 b + c] (+)= sum over taps t, tiles i, j < 4 of
  //   lhs[r / kMaxRows][t][r % kMaxRows][4 i + j] *
  //   rhs[(b * rhs_tiles + t * num_tiles + i)][c][j]                                  exact int32
  // lhs: pointers to 4 * num_tiles bytes, [tiles of rows][num_taps][kMaxRows]; those of rows that
  // do not exist are not used. rhs: num_blocks blocks of rhs_tiles tiles of 64 signed bytes. dst:
  // [num_rows][kPanelN]. num_rows: at least 1, num_blocks: 1..kPanelBlocks. No |rhs| is beyond
  // `limit`, at most 128. The caller keeps sums within int32. Never saturates. `ahead`: memory that
  // is needed soon, which may be asked for meanwhile.
  void (*gemm_s32_u8_s8)(const uint8_t* const* lhs, size_t num_taps, size_t num_tiles,
                         const int8_t* rhs, size_t rhs_tiles, size_t num_rows, size_t num_blocks,
                         int limit, int accumulate, AfpqAhead ahead, int32_t* dst);

  // The same of one tap and one block, whose codes are expanded on the way, by a table as
  // expand_s8_afp takes it; there is a tile at least:
  //   dst[r][c] (+)= sum over tiles i, j < 4 of lhs[r][4 i + j] * table[code of (channel c, step
  //                  4 i + j)]
  void (*gemm_s32_u8_afp)(const uint8_t* const* lhs, size_t num_rows, const uint8_t* src,
                          size_t num_tiles, unsigned bits, const int8_t* table, int accumulate,
                          int32_t* dst);

  // The same for words, rhs as expand_s16_afp writes it (64 words a tile). Sums wrap around: they
  // are exact modulo 2^32. No two neighbours of rhs are both -32768.
  void (*gemm_s32_s16_s16)(const int16_t* const* lhs, size_t num_taps, size_t num_tiles,
                           const int16_t* rhs, size_t rhs_tiles, size_t num_rows, size_t num_blocks,
                           int accumulate, int32_t* dst);

  // Depthwise: channels meet only their own weights.
  //   dst[y * num_columns + x][16 b + c] = sum over t < num_taps of                   exact int32
  //       lhs[t][y * line_step + x * step + 16 b + c] *
  //       rhs[b * rhs_tiles + t / 4][t % 4 / 2][c][t % 2]
  // lhs: where each tap of the first pixel is; y < num_lines, x < num_columns, any number of both.
  // rhs as expand_s16_afp writes it; the weight behind the last tap, if their number is odd, is 0.
  void (*depthwise_s32_u8_s16)(const uint8_t* const* lhs, size_t step, size_t line_step,
                               size_t num_taps, const int16_t* rhs, size_t rhs_tiles,
                               size_t num_lines, size_t num_columns, size_t num_blocks,
                               int32_t* dst);

  // gemm in float: lhs pointers to 4 * num_tiles floats, rhs as expand_f32_afp writes it (64
  // floats a tile). Each output is one chain of fma in (t, i, j) order, starting from 0 or from
  // dst.
  void (*gemm_f32_f32_f32)(const float* const* lhs, size_t num_taps, size_t num_tiles,
                           const float* rhs, size_t rhs_tiles, size_t num_rows, size_t num_blocks,
                           int accumulate, float* dst);

  void (*gemm_pixels_f32_u8_s8)(const AfpqPixels* p);
  void (*gemm_pixels_f32_s16_s16)(const AfpqPixels* p);

  // Of src[0..count) and 0.
  void (*range_f32)(const float* src, size_t count, AfpqRange* range);

  // src[0..count) -> planes[p][0..count).
  void (*quantize_u8_f32)(const float* src, size_t count, const AfpqQuantize* q);
  // src[0..count) -> words[0..count).
  void (*quantize_s16_f32)(const float* src, size_t count, const AfpqQuantize* q);

  // Channel planes to channel-last rows: src[c * src_stride + x] -> planes[p][x * num_channels +
  // c], x < count, c < num_channels.
  void (*quantize_transpose_u8_f32)(const float* src, size_t src_stride, size_t num_channels,
                                    size_t count, const AfpqQuantize* q);

  // The same to words[x * num_channels + c].
  void (*quantize_transpose_s16_f32)(const float* src, size_t src_stride, size_t num_channels,
                                     size_t count, const AfpqQuantize* q);

  // Channel planes to pixels, as gemm_pixels reads them: pixel x of row r of channel c -> planes[0]
  // at 4 * (c / 4 * pixel_stride + r * row_pitch + x) + c % 4, or words at 2 * (c / 2 *
  // pixel_stride + r * row_pitch + x) + c % 2.
  void (*quantize_pixels_u8_f32)(const AfpqPixelSource* s, const AfpqQuantize* q);
  void (*quantize_pixels_s16_f32)(const AfpqPixelSource* s, const AfpqQuantize* q);

  // Channel planes to rows without rounding: dst[x * num_channels + c] = src[c * src_stride + x].
  void (*transpose_f32)(const float* src, size_t src_stride, size_t num_channels, size_t count,
                        float* dst);

  void (*combine_f32_s32)(const AfpqCombine* c);
  void (*store_f32)(const AfpqStore* s);
  void (*finish_f32_s32)(const AfpqFinishFloats* f);
  void (*store_u8_f32)(const AfpqStoreBytes* s);
  void (*finish_u8_s32)(const AfpqFinish* f);

  // A residual behind what store_f32, finish_f32_s32, gemm_pixels or planar_f32 wrote, to planes
  // or, for channels read rows, to rows: dst[c * stride + i] = clamp(dst[c * stride + i] + src[c *
  // stride + i]), c < num_channels, i < count.
  void (*add_clamp_f32)(const float* src, size_t stride, size_t num_channels, size_t count,
                        float low, float high, float* dst);

  // Every step-th element of rows: dst[r * dst_stride + i] = src[r * src_stride + i * step], r <
  // num_rows, i < count.
  void (*pick_f32)(const float* src, size_t src_stride, size_t step, size_t num_rows, size_t count,
                   size_t dst_stride, float* dst);

  void (*planar_f32)(const AfpqPlanar* p);
  void (*planar_rows_f32)(const AfpqPlanarRows* p);
  void (*depthwise_f32)(const AfpqDepthwise* p);
} AfpqKernels;

// The tables, best first, ends with null. A table is listed only if it was compiled in; `supported`
// asks the processor.
typedef struct AfpqIsa {
  const AfpqKernels* kernels;
  int (*supported)(void);
} AfpqIsa;

extern const AfpqKernels kAfpqKernelsScalar;
#if defined(AFPQ_X86_64)
extern const AfpqKernels kAfpqKernelsAvx2;
extern const AfpqKernels kAfpqKernelsAvx512Vnni;
#endif
#if defined(AFPQ_ARM64)
extern const AfpqKernels kAfpqKernelsNeon;
#endif

#ifdef __cplusplus
}
#endif
