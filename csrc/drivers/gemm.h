// The loop nest shared by matrix products and convolutions: dst[m, n] = clamp(lhs[m, k] * weight[n,
// k]^T * scales + bias).
//
//   for each task (a range of rows x a panel of 64 channels):            parallel
//     expand the panel's codes into signed bytes (L1/L2)                 once per task
//     for each block of rows that fits L1:
//       for each segment of k, each plane, each tile of 6 byte rows:     gemm_s32_u8_s8
//       combine planes and scales to float; add bias, clamp, store
//
// Activations are byte planes: a8 has one row of bytes per row of lhs, a16 two (high, low). The f32
// mode and the wide formats take the same path with floats in place of bytes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "core/parallel.h"
#include "drivers/weight.h"
#include "kernels/kernels.h"

namespace afpq {

enum class Activations { kF32 = 0, kA8 = 1, kA16 = 2 };  // the value is the number of byte planes

// How lhs becomes rows. A mode alone gives every row a scale of its own; kA8 with a scale rounds
// all of lhs to the values of one format.
struct LhsRounding {
  Activations mode = Activations::kA16;
  Format format;    // of activations, if scale > 0
  float scale = 0;  // see is_short_scale
};

// Planes of byte rows that run on a weight of this format; 0 means float rows.
inline int lhs_planes(Activations mode, const Format& format) {
  return format.num_planes() == 0 ? 0 : static_cast<int>(mode);
}

// Where the rows of lhs lie. Either row r starts at plane + r * stride (offsets null: one tap of
// all k), or tap t of row r starts at plane + offsets[r * num_taps + t] (bytes or floats), or at
// `padding` where the offset is negative.
struct LhsRows {
  const uint8_t* bytes[2] = {nullptr, nullptr};  // a8: [0]; a16: high, low
  const float* floats = nullptr;                 // f32
  size_t stride = 0;
  const int32_t* offsets = nullptr;
  size_t num_taps = 1;
  const uint8_t* byte_padding[2] = {nullptr, nullptr};
  const float* float_padding = nullptr;
};

struct GemmJob {
  const AfpqKernels* kernels = nullptr;
  const PackedWeight* weight = nullptr;
  Activations mode = Activations::kF32;
  LhsRows lhs;
  const float* row_scales = nullptr;     // [m]; ones for float rows
  const int32_t* zero_points = nullptr;  // [m]; unused for float rows
  const float* bias = nullptr;           // [all channels of the weight] or null
  float low, high;                       // clamp
  float* dst = nullptr;                  // of the first channel of this job
  size_t row_stride = 0;                 // elements
  size_t channel_stride = 0;
  size_t m = 0;
  size_t first_block = 0;  // of the weight: a convolution's group starts here
  size_t n = 0;            // channels of this job
};

void gemm(const GemmJob& job, const Parallel& parallel);

// How a row (of a convolution: a sample) of this range, 0 included, is rounded to byte planes: with
// a scale and a zero point of its own, or those of the static format. NaN or infinity in a row
// makes its scale NaN, so the row's results are NaN as they would be in float.
struct RowQuantizer {
  float scale;
  AfpqQuantize quantize;
};
RowQuantizer row_quantizer(const LhsRounding& rounding, float low, float high, bool finite);

}  // namespace afpq
