#include "drivers/patches.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace afpq {
namespace {

// Taps that lie next to each other: those of a row of the kernel, or single ones.
struct Runs {
  std::vector<size_t> offsets;  // from the first tap, in elements
  size_t size;                  // elements

  Runs(const ConvShape& shape, const PaddedInput& input) {
    const bool whole = shape.dilations[2] == 1;
    size = (whole ? shape.kernel[2] : 1) * input.channels;
    for (size_t kz = 0; kz < shape.kernel[0]; ++kz) {
      for (size_t ky = 0; ky < shape.kernel[1]; ++ky) {
        const size_t line = kz * shape.dilations[0] * input.extent[1] + ky * shape.dilations[1];
        for (size_t kx = 0; kx < (whole ? 1 : shape.kernel[2]); ++kx)
          offsets.push_back((line * input.extent[2] + kx * shape.dilations[2]) * input.channels);
      }
    }
  }
};

// In kSteps of 16 bytes, the last of which goes beyond a run: what follows is written later. 0: run
// by run as long as it is.
template <size_t kSteps, typename T>
void copy_runs(const Runs& runs, const T* src, T* dst) {
  for (const size_t offset : runs.offsets) {
    if constexpr (kSteps == 0) {
      std::copy(src + offset, src + offset + runs.size, dst);
    } else {
      std::memcpy(dst, src + offset, kSteps * 16);
    }
    dst += runs.size;
  }
}

}  // namespace

PaddedInput::PaddedInput(const ConvShape& shape) : channels(shape.channels_in) {
  for (int axis = 0; axis < 3; ++axis) extent[axis] = shape.num_reached(axis);
}

template <typename T>
void gather_patches(const ConvShape& shape, const T* padded, size_t row, T* dst) {
  const PaddedInput input(shape);
  const Runs runs(shape, input);
  const size_t size = shape.num_taps() * input.channels;
  const size_t bytes = runs.size * sizeof(T);
  const auto copy = bytes <= 16 ? copy_runs<1, T> : bytes <= 32 ? copy_runs<2, T> : copy_runs<0, T>;
  for (size_t z = 0; z < shape.out[0]; ++z) {
    for (size_t y = 0; y < shape.out[1]; ++y) {
      const size_t line = z * shape.strides[0] * input.extent[1] + y * shape.strides[1];
      const T* src = padded + line * input.extent[2] * input.channels;
      for (size_t x = 0; x < shape.out[2]; ++x, dst += row) {
        copy(runs, src + x * shape.strides[2] * input.channels, dst);
        std::fill(dst + size, dst + row, T{0});
      }
    }
  }
}

template void gather_patches(const ConvShape&, const uint8_t*, size_t, uint8_t*);
template void gather_patches(const ConvShape&, const int16_t*, size_t, int16_t*);
template void gather_patches(const ConvShape&, const float*, size_t, float*);

}  // namespace afpq
