#include "drivers/max_pool.h"

#include <algorithm>

#include "core/scratch.h"

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

void take_larger(const uint8_t* __restrict src, size_t count, uint8_t* __restrict dst) {
  for (size_t i = 0; i < count; ++i) dst[i] = std::max(dst[i], src[i]);
}

// The largest bytes of the input rows that windows of one output row reach: [in[2]][channels].
void pool_rows(const ConvShape& shape, const uint8_t* src, const Window& z, const Window& y,
               uint8_t* dst) {
  const size_t row = shape.in[2] * shape.channels_in;
  std::fill(dst, dst + row, uint8_t{0});
  for (size_t iz = z.begin; iz < z.end; iz += shape.dilations[0]) {
    for (size_t iy = y.begin; iy < y.end; iy += shape.dilations[1])
      take_larger(src + (iz * shape.in[1] + iy) * row, row, dst);
  }
}

// The same of the columns of one output.
void pool_columns(const ConvShape& shape, const uint8_t* rows, const Window& x, uint8_t* dst) {
  const size_t channels = shape.channels_in;
  std::fill(dst, dst + channels, uint8_t{0});
  for (size_t ix = x.begin; ix < x.end; ix += shape.dilations[2])
    take_larger(rows + ix * channels, channels, dst);
}

}  // namespace

void max_pool(const ConvShape& shape, const uint8_t* src, size_t batch, uint8_t* dst,
              const Parallel& parallel) {
  const size_t rows = batch * shape.out[0] * shape.out[1], channels = shape.channels_in;
  const size_t row_bytes = shape.out[2] * channels;
  const size_t step = std::max<size_t>(1, kTaskBytes / std::max<size_t>(1, row_bytes));
  parallel_for(parallel, ceil_div(rows, step), [&](size_t task) {
    task_scratch().reset(Scratch::room<uint8_t>(shape.in[2] * channels));
    uint8_t* largest = task_scratch().take<uint8_t>(shape.in[2] * channels);
    for (size_t r = task * step; r < std::min(rows, (task + 1) * step); ++r) {
      const size_t sample = r / shape.out[1] / shape.out[0];
      const Window z(shape, 0, r / shape.out[1] % shape.out[0]), y(shape, 1, r % shape.out[1]);
      const uint8_t* from = src + sample * shape.num_in() * channels;
      pool_rows(shape, from, z, y, largest);
      for (size_t x = 0; x < shape.out[2]; ++x)
        pool_columns(shape, largest, Window(shape, 2, x), dst + r * row_bytes + x * channels);
    }
  });
}

}  // namespace afpq
