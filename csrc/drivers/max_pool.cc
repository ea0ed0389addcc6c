#include "drivers/max_pool.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/scratch.h"

namespace afpq {
namespace {

constexpr size_t kTaskBytes = size_t{1} << 16;

// The positions of a window along one axis that lie in the input: `count`, from `begin` on, each
// the dilation apart.
struct Window {
  size_t begin, count;
  Window(const ConvShape& shape, int axis, size_t out) {
    const size_t first = out * shape.strides[axis], pad = shape.pads[axis];
    const size_t step = shape.dilations[axis];
    const size_t skipped = first < pad ? ceil_div(pad - first, step) : 0;
    begin = first + skipped * step - pad;
    const size_t end = std::min(first + shape.reach(axis) + 1, shape.in[axis] + pad) - pad;
    count = end > begin ? ceil_div(end - begin, step) : 0;
  }
};

// For the compiler to put into registers of any processor.
using Bytes8 = uint8_t __attribute__((vector_size(8)));
using Bytes16 = uint8_t __attribute__((vector_size(16)));

// The largest of rows `stride` apart: kRows of them, or num_rows, one at least, if that is 0. T:
// uint8_t or some of them.
template <typename T, size_t kRows>
[[gnu::always_inline]] inline T largest_of(const uint8_t* src, size_t stride, size_t num_rows) {
  T largest, value;
  std::memcpy(&largest, src, sizeof(T));
  const size_t rows = kRows ? kRows : num_rows;
#pragma GCC unroll 2
  for (size_t r = 1; r < rows; ++r) {
    std::memcpy(&value, src + r * stride, sizeof(T));
    largest = value > largest ? value : largest;
  }
  return largest;
}

template <size_t kRows>
void take_largest(const uint8_t* src, size_t stride, size_t num_rows, size_t count, uint8_t* dst) {
  size_t i = 0;
  const auto step = [&](auto type) {
    using T = decltype(type);
    for (; i + sizeof(T) <= count; i += sizeof(T)) {
      const T largest = largest_of<T, kRows>(src + i, stride, num_rows);
      std::memcpy(dst + i, &largest, sizeof(T));
    }
  };
  step(Bytes16{});
  step(Bytes8{});
  step(uint8_t{});
}

// dst[count], zeros if there are no rows.
void take_largest(const uint8_t* src, size_t stride, size_t num_rows, size_t count, uint8_t* dst) {
  if (num_rows == 0) return std::fill(dst, dst + count, uint8_t{0});
  (num_rows == 2   ? take_largest<2>
   : num_rows == 3 ? take_largest<3>
                   : take_largest<0>)(src, stride, num_rows, count, dst);
}

// The largest bytes of the input rows that windows of one output row reach: [in[2]][channels].
// rows: those of each depth, as many bytes each.
void pool_rows(const ConvShape& shape, const uint8_t* src, const Window& z, const Window& y,
               uint8_t* rows, uint8_t* dst) {
  const size_t row = shape.in[2] * shape.channels_in;
  const auto largest = [&](size_t plane, uint8_t* to) {
    take_largest(src + (plane * shape.in[1] + y.begin) * row, shape.dilations[1] * row, y.count,
                 row, to);
  };
  if (z.count == 1) return largest(z.begin, dst);
  for (size_t i = 0; i < z.count; ++i) largest(z.begin + i * shape.dilations[0], rows + i * row);
  take_largest(rows, row, z.count, row, dst);
}

// The same of the columns of one output.
void pool_columns(const ConvShape& shape, const uint8_t* rows, const Window& x, uint8_t* dst) {
  const size_t channels = shape.channels_in;
  take_largest(rows + x.begin * channels, shape.dilations[2] * channels, x.count, channels, dst);
}

}  // namespace

void max_pool(const ConvShape& shape, const uint8_t* src, size_t batch, uint8_t* dst,
              const Parallel& parallel) {
  const size_t rows = batch * shape.out[0] * shape.out[1], channels = shape.channels_in;
  const size_t row_bytes = shape.out[2] * channels;
  const size_t step = std::max<size_t>(1, kTaskBytes / std::max<size_t>(1, row_bytes));
  std::vector<Window> columns;
  for (size_t x = 0; x < shape.out[2]; ++x) columns.emplace_back(shape, 2, x);
  parallel_for(parallel, ceil_div(rows, step), [&](size_t task) {
    const size_t row = shape.in[2] * channels;
    task_scratch().reset(Scratch::room<uint8_t>(row) +
                         Scratch::room<uint8_t>(shape.kernel[0] * row));
    uint8_t* largest = task_scratch().take<uint8_t>(row);
    uint8_t* of_depths = task_scratch().take<uint8_t>(shape.kernel[0] * row);
    for (size_t r = task * step; r < std::min(rows, (task + 1) * step); ++r) {
      const size_t sample = r / shape.out[1] / shape.out[0];
      const Window z(shape, 0, r / shape.out[1] % shape.out[0]), y(shape, 1, r % shape.out[1]);
      const uint8_t* from = src + sample * shape.num_in() * channels;
      pool_rows(shape, from, z, y, of_depths, largest);
      for (size_t x = 0; x < shape.out[2]; ++x)
        pool_columns(shape, largest, columns[x], dst + r * row_bytes + x * channels);
    }
  });
}

}  // namespace afpq
