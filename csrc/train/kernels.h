// Rounding of float32 to small floats, and matrix products whose sums are rounded: one table per
// instruction set, compiled from one source (kernels.inc), so that all give the same bits. The
// definition in NumPy: afpq/floats.py.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  kRandomBlock = 64,  // elements that the same 16 counters serve
  kRowTile = 3,       // rows that share a load of the panel
};

// A format as the kernels need it: bits of float32 numbers, sign clear.
//
// Numbers below `low_limit` are multiples of `step`, the others have `dropped_bits` mantissa bits
// less than a float32. A number that rounds to more than `max` becomes `overflow`.
typedef struct AfpqFloatFormat {
  int32_t low_limit;
  int32_t max;
  int32_t overflow;
  int32_t dropped_bits;  // 13..23
  int32_t tie_flip;      // 1 where codes with an even mantissa are odd: formats without a mantissa
  float step;
} AfpqFloatFormat;

// Random bits: Philox4x32-7 (Salmon et al. 2011), keyed by the seed. The word for element
// 64 b + 16 w + l of a tensor is word w of counter (16 b + l, 0, 0).
typedef struct AfpqTrainKernels {
  const char* isa;
  int lanes;  // columns of a panel

  // dst[i] = round(src[i]); dst may be src.
  void (*round_nearest)(const AfpqFloatFormat* format, const float* src, float* dst, size_t size);
  // The same with the neighbour further from 0 taken with the probability that makes the mean
  // right. `first` is the index of src[0], a multiple of 64.
  void (*round_stochastic)(const AfpqFloatFormat* format, uint64_t seed, uint64_t first,
                           const float* src, float* dst, size_t size);

  // One chunk of k for all rows and `lanes` columns, sums rounded after each addition:
  //   s = 0; s = round(s + lhs[r][k] * panel[k][c]) for k in order; totals[r][c] =
  //   round(totals[r][c] + s)
  // lhs: rows of lhs_stride; panel: [chunk][lanes]; totals: [num_rows][lanes].
  void (*add_chunk)(const AfpqFloatFormat* format, const float* lhs, size_t lhs_stride,
                    const float* panel, size_t chunk, size_t num_rows, float* totals);
  // Stochastic: the word for the sum over k of element e = row * num_columns + column is word k % 4
  // of counter (e, k / 4, 1), and that of its addition to the total word j % 4 of counter (e,
  // j / 4, 2), j the chunk. e is `first_column` for row 0 and lane 0.
  void (*add_chunk_stochastic)(const AfpqFloatFormat* format, uint64_t seed, const float* lhs,
                               size_t lhs_stride, const float* panel, size_t chunk, size_t num_rows,
                               float* totals, uint64_t first_column, uint64_t num_columns,
                               uint32_t first_k, uint32_t chunk_index);
} AfpqTrainKernels;

extern const AfpqTrainKernels kAfpqTrainGeneric;
extern const AfpqTrainKernels kAfpqTrainAvx2;
extern const AfpqTrainKernels kAfpqTrainAvx512;

#ifdef __cplusplus
}
#endif
