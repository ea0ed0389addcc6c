// The paths of convolutions, which `conv` chooses from, and what they share.
#pragma once

#include <algorithm>

#include "core/scratch.h"
#include "drivers/conv.h"

namespace afpq {

// That of all.
inline AfpqRange widest(const AfpqRange* ranges, size_t count) {
  AfpqRange all = {0, 0};
  for (size_t i = 0; i < count; ++i)
    all = {std::max(all.above, ranges[i].above), std::max(all.below, ranges[i].below)};
  return all;
}

// How a sample is rounded, by its range.
RowQuantizer sample_quantizer(const Conv& op, const ConvShape& shape, const float* src,
                              const Parallel& parallel);

// Channel planes [channels][count] to channel-last rows of elements.
void quantize_planes(const AfpqKernels& kernels, const Products& products,
                     const RowQuantizer& quantizer, const float* src, size_t count, size_t channels,
                     uint8_t* const* rows, const Parallel& parallel);

// `count` numbers, or none if src is null, in units of the output, in scratch that has room for
// them.
inline const float* in_units(const float* src, size_t count, const OutputUnit& unit,
                             Scratch* scratch) {
  if (!src) return nullptr;
  float* result = scratch->take<float>(count);
  std::transform(src, src + count, result, unit);
  return result;
}

// Pixels as rows of elements: what no other path takes. `conv_patches` copies the taps of a pixel
// into one row, where there are no groups.
void conv_rows(const Conv& op, const ConvShape& shape, const ConvSource& src, size_t batch,
               const ConvTarget& dst, const Parallel& parallel);
void conv_patches(const Conv& op, const ConvShape& shape, const ConvSource& src, size_t batch,
                  const ConvTarget& dst, const Parallel& parallel);

// The product whose rows are `count` pixels of a sample and whose columns are channels of output:
// all but its lhs and bias.
struct JobRange {
  size_t index;         // of the sample
  size_t first, count;  // pixels
  size_t channel, channels;
};
GemmJob conv_job(const Conv& op, const ConvShape& shape, const Products& products,
                 const ConvTarget& dst, const JobRange& range);

// Whether a convolution is depthwise and runs on bytes; and its job then: rows of lhs are pixels
// that hold all channels, and channel c of tap t meets step t of channel c.
bool conv_fits_depthwise(const Conv& op, const ConvShape& shape);
void depthwise(const GemmJob& job, const ConvShape& shape, const Parallel& parallel);

// The path of 1-D and 2-D convolutions whose sums are single dot products with pixels in the lanes,
// and whether it takes this one.
bool conv_fits_pixels(const Conv& op, const ConvShape& shape, const Products& products);
void conv_pixels(const Conv& op, const ConvShape& shape, const Products& products, const float* src,
                 size_t batch, const ConvTarget& dst, const Parallel& parallel);

// Elements [begin, end) of a plane, but for those of rows [first, last), of which row y is `width`
// elements from y * pitch + left on.
template <typename T>
void fill_around_rows(T* plane, size_t begin, size_t end, size_t first, size_t last, size_t pitch,
                      size_t left, size_t width, T value) {
  for (size_t y = first; y < last; ++y) {
    const size_t at = y * pitch + left;
    std::fill(plane + begin, plane + at, value);
    begin = at + width;
  }
  std::fill(plane + begin, plane + end, value);
}

// What follows the sums of float planes, in units of the output; of bytes, in the layer's scratch.
struct PlanarEnd {
  const float* scales;  // [channels]
  const float* bias;    // or null
  float low, high;

  PlanarEnd(const Conv& op, size_t channels, bool to_bytes);
};

// How many of `total` items of work, of so many products each, make a task: eight or more, unless
// there is not enough to do.
inline size_t planar_step(size_t total, size_t products) {
  constexpr size_t kLeastWork = size_t{1} << 14, kMostWork = size_t{1} << 18;
  const size_t tasks = std::clamp<size_t>(total * products / kLeastWork, 1, 8);
  return std::max<size_t>(1, std::min(ceil_div(total, tasks), kMostWork / products));
}

// How many rows make a strip where there would be `items` of `height` rows and so many products:
// few strips are cut for more threads, if there is something to do in each, to multiples of `rows`.
inline size_t strip_height(size_t height, size_t items, size_t products, size_t rows) {
  constexpr size_t kLeastItems = 4, kLeastWork = size_t{1} << 15;
  const size_t cuts = std::min(ceil_div(kLeastItems, items), products / kLeastWork);
  if (cuts <= 1) return height;
  return std::min(height, ceil_div(ceil_div(height, cuts), rows) * rows);
}

// The planar path of planes without groups with channels in the lanes; no residual of bytes.
void conv_planar_rows(const Conv& op, const ConvShape& shape, const float* src, size_t batch,
                      const ConvTarget& dst, const Parallel& parallel);

// The planar path of depthwise convolutions with small planes, of floats only, and whether it takes
// this one.
bool conv_fits_lanes(const ConvShape& shape);
void conv_planar_lanes(const Conv& op, const ConvShape& shape, const float* src, size_t batch,
                       const ConvTarget& dst, const Parallel& parallel);

// The planar path; no residual of bytes.
void conv_planar(const Conv& op, const ConvShape& shape, const float* src, size_t batch,
                 const ConvTarget& dst, const Parallel& parallel);

}  // namespace afpq
