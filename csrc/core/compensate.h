// Error-compensated rounding: codes and scales of a weight such that the products of a layer keep
// their values, not the weights.
//
// With H = E[x x^T] of a layer's input, a row v in place of w changes its output by an expected
// squared error of (v - w) H (v - w)^T. Three steps make it small, row by row:
//
//  1. Feedback rounding, one weight after the other: what rounding did to earlier ones is made up
//     for by later ones. With H = (1 + U) D (1 + U)^T, U strictly upper triangular, weight j is
//     rounded from w_j + sum over i < j of (w_i - v_i) U_ij. This is GPTQ (Frantar et al. 2022) in
//     the form of LDLQ (Chee et al. 2023, Theorem 1), which needs no inverse of H.
//  2. Coordinate descent: each weight in turn moves to the value that is best given all others.
//  3. The scale that is best for the integers found, in closed form; then step 2 again.
//
// Every row is on its own, so results depend neither on the number of threads nor on other rows.
#pragma once

#include <cstddef>

#include "core/format.h"
#include "core/scale_search.h"

namespace afpq {

// The moments of one layer input, or of one group of a grouped convolution.
struct InputMoments {
  const float* second;    // H [k, k], symmetric positive definite
  const float* feedback;  // U [k, k]; its strictly upper part is read
  size_t k;
};

// Rounds target [n, k]. scales[n] holds storable scales to start from and receives the final ones;
// values[n, k] receives the rounded weights (integers of the format times the scale, exact in
// float), errors[n] the expected squared error of every row. Up to `num_refits` times the scale is
// refitted, as long as the error falls; 0 keeps it.
void round_compensated(const float* target, size_t n, const InputMoments& moments,
                       const Format& format, ScaleKind kind, int num_refits, size_t num_threads,
                       float* scales, float* values, double* errors);

}  // namespace afpq
