// Convolution of any rank 1..3 with strides, pads, dilations and groups. Tensors are channel-first
// floats, or channel-last bytes of a static format, as convolutions pass them to each other.
//
// Four paths. `gemm`: each sample is rounded to byte planes and turned channel-last, unless it is
// bytes already; then taps are read in place through offsets (or patches are gathered when the
// channels of a tap are not a multiple of 4). `depthwise`: the same rows, each channel by itself.
// `pixels`: where the instruction set prefers it, planes of floats stay channel-first. `planar`:
// small convolutions, and depthwise ones without a static format, run on the float planes
// themselves.
#pragma once

#include "drivers/gemm.h"

namespace afpq {

// All spatial quantities have three axes (depth, height, width); missing leading axes are 1 (or 0
// for pads).
struct ConvShape {
  size_t channels_in = 0;
  size_t channels_out = 0;
  size_t groups = 1;
  size_t in[3] = {1, 1, 1};
  size_t out[3] = {1, 1, 1};
  size_t kernel[3] = {1, 1, 1};
  size_t strides[3] = {1, 1, 1};
  size_t dilations[3] = {1, 1, 1};
  size_t pads[3] = {0, 0, 0};  // at the beginning of each axis; `out` says where the end is

  size_t num_taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  size_t num_in() const { return in[0] * in[1] * in[2]; }
  size_t num_out() const { return out[0] * out[1] * out[2]; }
  // From the first tap of an output to its last.
  size_t reach(int axis) const { return (kernel[axis] - 1) * dilations[axis]; }
  // What all outputs read of an axis, padding included.
  size_t num_reached(int axis) const { return (out[axis] - 1) * strides[axis] + reach(axis) + 1; }
  // Without depth, and without padding there.
  bool is_flat() const { return in[0] == 1 && kernel[0] == 1 && out[0] == 1 && pads[0] == 0; }
  size_t group_in() const { return channels_in / groups; }
  size_t group_out() const { return channels_out / groups; }
};

inline bool conv_is_depthwise(const ConvShape& shape) {
  return shape.groups > 1 && shape.groups == shape.channels_in &&
         shape.groups == shape.channels_out && shape.num_taps() <= 256;  // sums fit int32
}

// Whether a convolution runs on float planes, which its attributes decide: groups do not fill tiles
// of 16 channels, or their taps cannot be read in place, or there is so little to multiply (the
// first layer of an image network) that rounding and gathering would cost more than the products.
// `is_static`: what it reads has a static format, so that there are bytes to multiply.
inline bool conv_is_planar(const ConvShape& shape, bool is_static) {
  const size_t few = is_static ? 16 : 64;
  if (shape.groups == 1)
    return shape.channels_in < kTileK && shape.channels_in * shape.num_taps() <= few;
  if (is_static && conv_is_depthwise(shape)) return false;
  return shape.group_out() % kTileN != 0 || shape.group_in() % kTileK != 0;
}

struct Conv {
  const AfpqKernels* kernels = nullptr;
  const PackedWeight* weight = nullptr;
  LhsRounding rounding;
  const float* bias = nullptr;  // [channels_out] or null
  float low, high;
  LhsRounding dst_rounding;       // of bytes
  LhsRounding residual_rounding;  // of a residual
};

// One of the two: [batch, channels_in, in...], or [batch, in..., channels_in] in the format that
// op.rounding gives.
struct ConvSource {
  const float* floats = nullptr;
  const uint8_t* bytes = nullptr;
};

// One of floats [batch, channels_out, out...] and bytes [batch, out..., channels_out].
struct ConvTarget {
  float* floats = nullptr;
  uint8_t* bytes = nullptr;
  // Added before the clamp: null, or shaped like bytes; or like floats, if that is what is written.
  const uint8_t* residual = nullptr;
  const float* float_residual = nullptr;
};

// Whether the integers of the activations are multiplied, which bytes and residuals need.
bool conv_multiplies_integers(const Conv& op, const ConvShape& shape);

void conv(const Conv& op, const ConvShape& shape, const ConvSource& src, size_t batch,
          const ConvTarget& dst, const Parallel& parallel);

}  // namespace afpq
