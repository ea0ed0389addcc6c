#include "drivers/taps.h"

#include "drivers/conv.h"

namespace afpq {
namespace {

// Positions of an axis under (output, tap) times `step`, or -1 in the padding.
std::vector<int32_t> axis_offsets(const ConvShape& shape, int axis, size_t step) {
  std::vector<int32_t> offsets;
  offsets.reserve(shape.out[axis] * shape.kernel[axis]);
  for (size_t out = 0; out < shape.out[axis]; ++out) {
    for (size_t tap = 0; tap < shape.kernel[axis]; ++tap) {
      const size_t at = out * shape.strides[axis] + tap * shape.dilations[axis];
      const bool inside = at >= shape.pads[axis] && at - shape.pads[axis] < shape.in[axis];
      offsets.push_back(inside ? static_cast<int32_t>((at - shape.pads[axis]) * step) : -1);
    }
  }
  return offsets;
}

}  // namespace

TapOffsets::TapOffsets(const ConvShape& shape, size_t channels)
    : kernel_{shape.kernel[0], shape.kernel[1], shape.kernel[2]},
      lines_(shape.out[1]),
      line_(shape.out[2]),
      step_(shape.strides[2] * channels),
      planes_(axis_offsets(shape, 0, shape.in[1] * shape.in[2] * channels)),
      rows_(axis_offsets(shape, 1, shape.in[2] * channels)),
      columns_(axis_offsets(shape, 2, channels)) {}

void TapOffsets::find_begins(size_t zy, int32_t* begins) const {
  const int32_t* plane = &planes_[zy / lines_ * kernel_[0]];
  const int32_t* row = &rows_[zy % lines_ * kernel_[1]];
  for (size_t kz = 0; kz < kernel_[0]; ++kz) {
    for (size_t ky = 0; ky < kernel_[1]; ++ky)  // either is -1 only in the padding
      *begins++ = (plane[kz] | row[ky]) < 0 ? -1 : plane[kz] + row[ky];
  }
}

}  // namespace afpq
