#include "drivers/max_pool.h"

#include <algorithm>

namespace afpq {
namespace {

constexpr size_t kTaskBytes = size_t{1} << 16;

// The positions of a window along one axis that lie in the input: begin, begin + dilation .. < end.
struct Window {
  size_t begin, end;
  Window(const ConvShape& shape, int axis, size_t out) {
    const size_t first = out * shape.strides[axis], pad = shape.pads[axis];
    const size_t step = shape.dilations[axis];
    const size_t skipped = first < pad ? ceil_div(pad - first, step) : 0;
    begin = first + skipped * step - pad;
    end = std::min(first + (shape.kernel[axis] - 1) * step + 1, shape.in[axis] + pad) - pad;
  }
};

void pool_pixel(const ConvShape& shape, const uint8_t* src, const Window& z, const Window& y,
                const Window& x, uint8_t* dst) {
  const size_t channels = shape.channels_in;
  std::fill(dst, dst + channels, uint8_t{0});
  for (size_t iz = z.begin; iz < z.end; iz += shape.dilations[0]) {
    for (size_t iy = y.begin; iy < y.end; iy += shape.dilations[1]) {
      for (size_t ix = x.begin; ix < x.end; ix += shape.dilations[2]) {
        const uint8_t* pixel = src + ((iz * shape.in[1] + iy) * shape.in[2] + ix) * channels;
        for (size_t c = 0; c < channels; ++c) dst[c] = std::max(dst[c], pixel[c]);
      }
    }
  }
}

}  // namespace

void max_pool(const ConvShape& shape, const uint8_t* src, size_t batch, uint8_t* dst,
              const Parallel& parallel) {
  const size_t rows = batch * shape.out[0] * shape.out[1], channels = shape.channels_in;
  const size_t row_bytes = shape.out[2] * channels;
  const size_t step = std::max<size_t>(1, kTaskBytes / std::max<size_t>(1, row_bytes));
  parallel_for(parallel, ceil_div(rows, step), [&](size_t task) {
    for (size_t r = task * step; r < std::min(rows, (task + 1) * step); ++r) {
      const size_t sample = r / shape.out[1] / shape.out[0];
      const Window z(shape, 0, r / shape.out[1] % shape.out[0]), y(shape, 1, r % shape.out[1]);
      const uint8_t* from = src + sample * shape.num_in() * channels;
      for (size_t x = 0; x < shape.out[2]; ++x)
        pool_pixel(shape, from, z, y, Window(shape, 2, x), dst + r * row_bytes + x * channels);
    }
  });
}

}  // namespace afpq
