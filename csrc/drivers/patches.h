// Patches: the taps of an output pixel next to each other, for convolutions whose taps cannot be
// read in place. They are copied from an input with padding around it, so that none lies outside.
#pragma once

#include "drivers/conv.h"

namespace afpq {

// What the taps of all outputs reach of the input and its padding, pixels of channels_in elements.
struct PaddedInput {
  size_t extent[3];
  size_t channels;

  explicit PaddedInput(const ConvShape& shape);
  size_t num_elements() const { return extent[0] * extent[1] * extent[2] * channels; }
};

// Bytes that may be read behind a padded input, and written behind patches.
constexpr size_t kPatchSlack = 32;

// One row for each output: [num_out][row], zero beyond the taps.
template <typename T>
void gather_patches(const ConvShape& shape, const T* padded, size_t row, T* dst);

}  // namespace afpq
