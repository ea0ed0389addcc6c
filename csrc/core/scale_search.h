// Choosing scales and codes for a weight matrix: the compiled twin of `formats.encode` and the
// search over scales.
//
// Everything here works row by row, so a result never depends on the number of threads. The
// definition of the formats is afpq/formats.py; tests prove `encode_rows` equal to it bit for bit.
// Which format a layer gets is decided in Python.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/format.h"

namespace afpq {

// How a scale is stored: `kReal` as a bfloat16, `kInteger` as a power of two with an exponent bias
// in -128..127.
enum class ScaleKind { kReal, kInteger };

// A weight [n, k] and the weight of each squared error. Row r uses energy row r * num_energy_rows /
// n, so one row serves all, or one row serves each group of a grouped convolution; null: every
// error counts 1.
struct WeightView {
  const float* weight;  // [n, k], finite
  size_t n;
  size_t k;
  const float* energy;  // [num_energy_rows, k], not negative
  size_t num_energy_rows;
};

// The storable scale nearest to `scale`, a normal float for which the
// largest value of the format is finite.
float round_scale(const Format& format, ScaleKind kind, double scale);

// For every row the best of a geometric grid of storable scales below and just above "the maximum
// fits" (values beyond the largest one saturate), refined around the best point: scales[n], and
// errors[n] as `scale_errors` computes them. A row of zeros gets scale 1 (or the nearest storable
// one). num_threads 0 is 1.
void search_scales(const WeightView& view, const Format& format, ScaleKind kind, size_t num_threads,
                   float* scales, double* errors);

// errors[r] = sum over k of energy * (weight - nearest value)^2 in double, with scales[r] or, if
// num_scales is 1, scales[0]. Scales are positive and finite.
void scale_errors(const WeightView& view, const Format& format, const float* scales,
                  size_t num_scales, size_t num_threads, double* errors);

// codes[n, k] of the nearest values, ties to the even code, saturating, never -0; scales as in
// `scale_errors`.
void encode_rows(const float* values, size_t n, size_t k, const Format& format, const float* scales,
                 size_t num_scales, size_t num_threads, uint8_t* codes);

}  // namespace afpq
