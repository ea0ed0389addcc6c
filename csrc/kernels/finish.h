// finish_f32_s32 out of a table's combine_f32_s32 and store_f32, a few rows at a time.
#pragma once

#include "kernels.h"

static inline void afpq_finish_floats(const AfpqFinishFloats* args,
                                      void (*combine_rows)(const AfpqCombine*),
                                      void (*store_rows)(const AfpqStore*)) {
  constexpr size_t kRows = 16;
  float rows[kRows * kPanelN];
  AfpqCombine combine = args->combine;
  AfpqStore store = args->store;
  combine.dst = rows;
  combine.num_channels = store.num_channels;
  combine.accumulate = 0;
  store.src = rows;
  for (size_t r = 0; r < args->store.num_rows; r += kRows) {
    const size_t rest = args->store.num_rows - r;
    combine.num_rows = store.num_rows = rest < kRows ? rest : kRows;
    combine_rows(&combine);
    store_rows(&store);
    for (int q = 0; q < combine.rhs_planes; ++q)
      combine.sums[q] += combine.num_rows * static_cast<size_t>(combine.lhs_planes) * kPanelN;
    combine.zero_points += combine.num_rows;
    store.row_scales += store.num_rows;
    store.dst += store.num_rows * store.row_stride;
  }
}
