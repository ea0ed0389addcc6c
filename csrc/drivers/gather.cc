#include "drivers/gather.h"

#include <algorithm>

namespace afpq {
namespace {

constexpr size_t kTaskElements = size_t{1} << 14;

}  // namespace

bool gather(const PackedWeight& weight, const int64_t* indices, size_t count, float* dst,
            const Parallel& parallel, int64_t* bad) {
  const int64_t n = static_cast<int64_t>(weight.n);
  for (size_t i = 0; i < count; ++i) {
    if (indices[i] < -n || indices[i] >= n) {
      *bad = indices[i];
      return false;
    }
  }
  const size_t step = std::max<size_t>(1, kTaskElements / weight.k);
  const auto row_at = [&](size_t i) {
    return static_cast<size_t>(indices[i] < 0 ? indices[i] + n : indices[i]);
  };
  parallel_for(parallel, ceil_div(count, step), [&](size_t task) {
    const size_t begin = task * step, end = std::min(count, begin + step);
    for (size_t i = begin; i < end; ++i) {
      float* row = dst + i * weight.k;
      if (i > begin && row_at(i) == row_at(i - 1)) {  // token types, padding
        std::copy(row - weight.k, row, row);
        continue;
      }
      decode_row(weight, row_at(i), row);
    }
  });
  return true;
}

void unpack(const PackedWeight& weight, float* dst, const Parallel& parallel) {
  const size_t step = std::max<size_t>(1, kTaskElements / weight.k);
  parallel_for(parallel, ceil_div(weight.n, step), [&](size_t task) {
    for (size_t row = task * step; row < std::min(weight.n, (task + 1) * step); ++row) {
      decode_row(weight, row, dst + row * weight.k);
    }
  });
}

}  // namespace afpq
