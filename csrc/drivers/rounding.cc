// How rows and samples become integers, and how results become bytes: the quantizers of gemm.h.
#include <cmath>
#include <limits>

#include "core/float_bits.h"
#include "drivers/gemm.h"

namespace afpq {

RowQuantizer static_quantizer(const LhsRounding& rounding) {
  RowQuantizer result;
  const float largest = static_cast<float>(rounding.format.max_integer());
  result.scale = result.quantize.scale = rounding.scale;
  result.quantize.num_planes = 1;
  result.quantize.low = rounding.format.is_signed ? -largest : 0.0f;
  result.quantize.high = largest;
  result.quantize.mantissa_bits = rounding.format.mantissa_bits;
  result.quantize.zero_point = rounding.format.is_signed ? 128 : 0;
  return result;
}

AfpqQuantize step_quantizer(const LhsRounding& rounding) {
  AfpqQuantize result = static_quantizer(rounding).quantize;
  result.scale = 1.0f;
  return result;
}

RowQuantizer row_quantizer(const LhsRounding& rounding, const AfpqRange& range) {
  constexpr uint32_t kSign = 0x80000000;
  const float below = range.below > kSign ? float_of(range.below - kSign) : 0.0f;
  const float above = float_of(static_cast<uint32_t>(range.above));
  RowQuantizer result;
  result.quantize.num_planes = static_cast<int>(rounding.mode);
  if (!std::isfinite(below) || !std::isfinite(above)) {
    result.scale = std::numeric_limits<float>::quiet_NaN();
    return result;
  }
  if (rounding.scale > 0) return static_quantizer(rounding);
  const float levels = rounding.mode == Activations::kA8 ? 255.0f : 65535.0f;
  result.scale = above / levels + below / levels;
  const float inverse = 1.0f / result.scale;
  if (!(result.scale > 0) || !std::isfinite(inverse)) {
    result.scale = 0;  // all zeros, or too small for float32 to scale: the row counts as zero
    return result;
  }
  result.quantize.inverse_scale = inverse;
  result.quantize.zero_point = static_cast<int32_t>(std::nearbyintf(below * inverse));
  return result;
}

}  // namespace afpq
