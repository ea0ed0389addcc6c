// The loop nest shared by matrix products and convolutions: dst[m, n] = clamp(lhs[m, k] * weight[n,
// k]^T * scales + bias).
//
//   for each task (a range of rows x a panel of 64 channels):            parallel
//     expand the panel's codes into signed bytes (L1/L2)                 once per task
//     for each block of rows that fits L1:
//       for each segment of k, each plane, each tile of 6 byte rows:     gemm_s32_u8_s8
//       combine planes and scales to float; add bias, clamp, store
//
// Activations are byte planes: a8 has one row of bytes per row of lhs, a16 two (high, low). Words
// can take the place of bytes (kernels.h). The f32 mode and the wide formats take the same path
// with floats in place of bytes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <limits>

#include "core/parallel.h"
#include "drivers/taps.h"
#include "drivers/weight.h"
#include "kernels/kernels.h"

namespace afpq {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

enum class Activations { kF32 = 0, kA8 = 1, kA16 = 2 };  // the value is the number of byte planes

// How lhs becomes rows. A mode alone gives every row a scale of its own; kA8 with a scale rounds
// all of lhs to the values of one format.
struct LhsRounding {
  Activations mode = Activations::kA16;
  Format format;    // of activations, if scale > 0
  float scale = 0;  // see is_short_scale
};

// In what form lhs meets a weight. Activations and weight have planes of their own; words need one
// of lhs, and one of the weight unless a16 meets the pair class.
enum class Elements { kFloats, kBytes, kWords };
struct Products {
  Elements elements = Elements::kFloats;
  int lhs_planes = 1;
  int rhs_planes = 1;

  size_t element_bytes() const {
    return elements == Elements::kFloats ? 4 : elements == Elements::kWords ? 2 : 1;
  }
};
// `rows`: of lhs. A few are bytes, which kernels multiply by codes.
Products products_of(const AfpqKernels& kernels, Activations mode, const PackedWeight& weight,
                     size_t rows = SIZE_MAX);

// Where the rows of lhs lie. Either row r starts at plane + r * stride (one tap of all k), or row r
// is pixel r of a convolution, whose taps lie in the plane, or at `padding`. All of it in elements,
// which are what the products ask for.
struct LhsRows {
  const void* planes[2] = {nullptr, nullptr};  // bytes of a16: high, low; else only [0]
  size_t stride = 0;
  const TapOffsets* taps = nullptr;
  const void* padding[2] = {nullptr, nullptr};

  size_t num_taps() const { return taps ? taps->num_taps() : 1; }
};

// What is added to a product before it is clamped: bytes of a static format, in rows as wide as
// those of byte_rows, or floats that lie like dst.
struct Residual {
  const float* floats = nullptr;   // of the first channel of the job
  const uint8_t* bytes = nullptr;  // the same
  int32_t zero = 0;
  float scale = 0;
};

// What the end of a layer counts in: ones if it writes floats, else the steps of the bytes' format.
// Row scales, biases, a residual's scale and bounds are taken to it, so that rounding divides
// nothing.
struct OutputUnit {
  float scale = 1.0f;

  // No infinity comes of a small scale: 0 times it is 0.
  float operator()(float x) const {
    constexpr float kLargest = std::numeric_limits<float>::max();
    if (scale == 1.0f || x != x) return x;
    return std::clamp(x / scale, -kLargest, kLargest);
  }
};

// Where results go if not to dst: bytes of a static format, in rows of `stride`. All rows of such a
// job have one scale and one zero point, and its row scales, bias, bounds and residual count in
// steps.
struct ByteRows {
  uint8_t* bytes = nullptr;
  AfpqQuantize quantize = {};
  size_t stride = 0;  // of the residual too
};

struct GemmJob {
  const AfpqKernels* kernels = nullptr;
  const PackedWeight* weight = nullptr;
  Products products;
  LhsRows lhs;
  const float* row_scales = nullptr;     // [m]; ones for float rows
  const int32_t* zero_points = nullptr;  // [m], in terms of the elements; unused for float rows
  const float* bias = nullptr;           // [all channels of the weight] or null
  float low, high;                       // clamp
  float* dst = nullptr;                  // of the first channel of this job
  size_t row_stride = 0;                 // elements
  size_t channel_stride = 0;
  ByteRows byte_rows;  // in place of dst, if its bytes are not null
  Residual residual;
  size_t m = 0;
  size_t first_block = 0;  // of the weight: a convolution's group starts here
  size_t n = 0;            // channels of this job
  size_t num_tasks = 8;    // at most, where rows are split: enough for a few threads
};

void gemm(const GemmJob& job, const Parallel& parallel);

// How a row (of a convolution: a sample) of this range, 0 included, is rounded to byte planes: with
// a scale and a zero point of its own, or those of the static format. NaN or infinity in a row
// makes its scale NaN, so the row's results are NaN as they would be in float.
struct RowQuantizer {
  float scale = 1.0f;
  AfpqQuantize quantize = {};

  // What zero becomes: of words, the number that they hold.
  int32_t zero_element(Elements elements) const {
    const bool centred = elements == Elements::kWords && quantize.num_planes == 2;
    return quantize.zero_point - (centred ? 32768 : 0);
  }
  // Of bytes, in each plane.
  uint8_t zero_byte(int plane) const {
    const bool high = plane == 0 && quantize.num_planes == 2;
    return static_cast<uint8_t>(high ? quantize.zero_point >> 8 : quantize.zero_point & 255);
  }
};
RowQuantizer row_quantizer(const LhsRounding& rounding, const AfpqRange& range);

// The same of a static format, whose rounding has a scale.
RowQuantizer static_quantizer(const LhsRounding& rounding);

// How numbers that count in the steps of a static format are rounded to it.
AfpqQuantize step_quantizer(const LhsRounding& rounding);

}  // namespace afpq
