// Functions of a table out of others of it.
#pragma once

#include "kernels.h"

// The products of kernels.h, a tile of rows at a time: tile(lhs, num_rows, dst).
template <typename Lhs, typename Sum, typename Tile>
static inline void afpq_by_row_tiles(const Lhs* const* lhs, size_t num_taps, size_t num_rows,
                                     Sum* dst, const Tile& tile) {
  constexpr size_t kRows = kMaxRows;
  for (size_t r = 0; r < num_rows; r += kRows) {
    const size_t rest = num_rows - r;
    tile(lhs + r * num_taps, rest < kRows ? rest : kRows, dst + r * kPanelN);
  }
}

// finish_f32_s32, a few rows at a time.
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

// gemm_s32_u8_afp, a few tiles at a time.
static inline void afpq_multiply_codes(
    const uint8_t* const* lhs, size_t num_rows, const uint8_t* src, size_t num_tiles, unsigned bits,
    const int8_t* table, int accumulate, int32_t* dst,
    void (*expand)(const uint8_t*, size_t, unsigned, const int8_t*, int8_t*),
    void (*gemm)(const uint8_t* const*, size_t, size_t, const int8_t*, size_t, size_t, size_t, int,
                 int, AfpqAhead, int32_t*)) {
  constexpr size_t kTiles = 32;
  int8_t codes[kTiles * kTileCodes];
  const uint8_t* rows[kMaxRows];
  for (size_t r = 0; r < num_rows; ++r) rows[r] = lhs[r];
  for (size_t at = 0; at < num_tiles; at += kTiles) {
    const size_t tiles = num_tiles - at < kTiles ? num_tiles - at : kTiles;
    expand(src + at * 8 * bits, tiles, bits, table, codes);
    gemm(rows, 1, tiles, codes, tiles, num_rows, 1, 128, accumulate || at > 0, {}, dst);
    for (size_t r = 0; r < num_rows; ++r) rows[r] += tiles * kTileK;
  }
}
