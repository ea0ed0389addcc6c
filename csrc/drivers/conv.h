// Convolution of any rank 1..3 with strides, pads, dilations and groups, on channel-first float
// tensors.
//
// Three paths. `gemm`: each sample is rounded to byte planes and turned channel-last, then taps are
// read in place through offsets (or patches are gathered when the channels of a tap are not a
// multiple of 4). `pixels`: where the instruction set prefers it, planes stay channel-first.
// `planar`: depthwise and small convolutions run on the float planes themselves.
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
  size_t group_in() const { return channels_in / groups; }
  size_t group_out() const { return channels_out / groups; }
};

// Whether a convolution runs on float planes, which its attributes decide: groups do not fill tiles
// of 16 channels, or their taps cannot be read in place, or there is so little to multiply (the
// first layer of an image network) that rounding and gathering would cost more than the products.
inline bool conv_is_planar(const ConvShape& shape) {
  if (shape.groups == 1)
    return shape.channels_in < kTileK && shape.channels_in * shape.num_taps() <= 64;
  return shape.group_out() % kTileN != 0 || shape.group_in() % kTileK != 0;
}

struct Conv {
  const AfpqKernels* kernels = nullptr;
  const PackedWeight* weight = nullptr;
  LhsRounding rounding;
  const float* bias = nullptr;  // [channels_out] or null
  float low, high;
};

// src: [batch, channels_in, in...], dst: [batch, channels_out, out...].
void conv(const Conv& op, const ConvShape& shape, const float* src, size_t batch, float* dst,
          const Parallel& parallel);

// How a sample is rounded, by its range.
RowQuantizer sample_quantizer(const Conv& op, const ConvShape& shape, const float* src,
                              const Parallel& parallel);

// The path of 1-D and 2-D convolutions whose sums are single dot products with pixels in the lanes,
// and whether it takes this one.
bool conv_fits_pixels(const Conv& op, const ConvShape& shape, const Products& products);
void conv_pixels(const Conv& op, const ConvShape& shape, const Products& products, const float* src,
                 size_t batch, float* dst, const Parallel& parallel);

// The planar path, chosen by `conv`.
void conv_planar(const Conv& op, const ConvShape& shape, const float* src, size_t batch, float* dst,
                 const Parallel& parallel);

}  // namespace afpq
