// Kernels that expand codes and multiply, compared with the scalar ones.
#include <algorithm>
#include <memory>

#include "tests/check.h"

namespace afpq::tests {
namespace {

// Of 256 entries, periodic in 2^bits.
template <typename T>
std::vector<T> periodic(std::vector<T> values, unsigned bits) {
  for (size_t i = size_t{1} << bits; i < 256; ++i) values[i] = values[i - (size_t{1} << bits)];
  return values;
}

template <typename T, typename Expand>
void compare_expand(Comparison* comparison, const char* name, const Expand& expand,
                    const std::vector<T>& entries) {
  comparison->begin(name);
  for (unsigned bits = 2; bits <= 8; ++bits) {
    const Guarded<T> table(periodic(entries, bits));
    for (const size_t tiles : {0, 1, 2, 3, 5}) {
      const Guarded<uint8_t> src(Random(tiles).integers<uint8_t>(tiles * 8 * bits, 0, 255));
      comparison->results(std::vector<T>(tiles * kTileCodes), text_of("bits, tiles", bits, tiles),
                          [&](const AfpqKernels& kernels, T* dst) {
                            (kernels.*expand)(src.data(), tiles, bits, table.data(), dst);
                          });
    }
  }
}

// Rows of taps that each end at a guard, as kernels take them.
template <typename T>
struct Rows {
  std::vector<std::unique_ptr<Guarded<T>>> rows;
  std::vector<const T*> pointers;

  template <typename Make>
  Rows(size_t taps, size_t num_rows, const Make& make)
      : pointers((num_rows + kMaxRows - 1) / kMaxRows * taps * kMaxRows, nullptr) {
    for (size_t t = 0; t < taps; ++t) {
      for (size_t r = 0; r < num_rows; ++r) {
        rows.push_back(std::make_unique<Guarded<T>>(make()));
        pointers[(r / kMaxRows * taps + t) * kMaxRows + r % kMaxRows] = rows.back()->data();
      }
    }
  }
};

struct GemmShape {
  size_t taps, tiles;
};
constexpr GemmShape kGemmShapes[] = {{1, 0}, {1, 1}, {1, 2}, {1, 7}, {2, 3}, {3, 1}, {9, 5}};

// lhs_of(count) and rhs_of(count) make elements, before_of(count) what dst holds.
template <typename Lhs, typename Sum, typename Rhs, typename MakeLhs, typename MakeRhs,
          typename MakeSum, typename Run>
void compare_gemm(Comparison* comparison, const MakeLhs& lhs_of, const MakeRhs& rhs_of,
                  const MakeSum& before_of, const Run& run) {
  for (const size_t rows : {1, 2, 3, 4, 5, 6, 7, 12, 16}) {
    for (size_t blocks = 1; blocks <= kPanelBlocks; ++blocks) {
      for (const GemmShape& shape : kGemmShapes) {
        const Rows<Lhs> lhs(shape.taps, rows, [&] { return lhs_of(shape.tiles * kTileK); });
        const size_t rhs_tiles = shape.taps * shape.tiles + blocks % 2;
        const Guarded<Rhs> rhs(rhs_of(blocks * rhs_tiles * kTileCodes));
        for (const int accumulate : {0, 1}) {
          comparison->results(before_of(rows * kPanelN),
                              text_of("rows, blocks, taps, tiles, accumulate", rows, blocks,
                                      shape.taps, shape.tiles, accumulate),
                              [&](const AfpqKernels& kernels, Sum* dst) {
                                run(kernels, lhs.pointers.data(), shape, rhs.data(), rhs_tiles,
                                    rows, blocks, accumulate, dst);
                              });
        }
      }
    }
  }
}

void compare_bytes(Comparison* comparison) {
  comparison->begin("gemm_s32_u8_s8");
  Random random(1);
  for (const int limit : {16, 32, 64, 127, 128}) {
    compare_gemm<uint8_t, int32_t, int8_t>(
        comparison, [&](size_t count) { return random.integers<uint8_t>(count, 0, 255); },
        [&](size_t count) { return random.integers<int8_t>(count, -limit, std::min(limit, 127)); },
        [&](size_t count) { return random.integers<int32_t>(count, -1000, 1000); },
        [&](const AfpqKernels& kernels, const uint8_t* const* lhs, const GemmShape& shape,
            const int8_t* rhs, size_t rhs_tiles, size_t rows, size_t blocks, int accumulate,
            int32_t* dst) {
          kernels.gemm_s32_u8_s8(lhs, shape.taps, shape.tiles, rhs, rhs_tiles, rows, blocks, limit,
                                 accumulate, {lhs[0], lhs[0] + shape.tiles * kTileK}, dst);
        });
  }
  // Sums as large as a segment's.
  constexpr size_t kTiles = 16384;
  const std::vector<uint8_t> row(kTiles * kTileK, 255);
  const uint8_t* lhs[kMaxRows] = {row.data(), row.data(), row.data()};
  for (const int weight : {-128, 127}) {
    const std::vector<int8_t> rhs(kTiles * kTileCodes, static_cast<int8_t>(weight));
    comparison->results(std::vector<int32_t>(3 * kPanelN), text_of("largest", weight),
                        [&](const AfpqKernels& kernels, int32_t* dst) {
                          kernels.gemm_s32_u8_s8(lhs, 1, kTiles, rhs.data(), kTiles, 3, 1, 128, 0,
                                                 {}, dst);
                        });
  }
}

void compare_codes(Comparison* comparison) {
  comparison->begin("gemm_s32_u8_afp");
  Random random(27);
  for (unsigned bits = 2; bits <= 8; ++bits) {
    const Guarded<int8_t> table(periodic(random.integers<int8_t>(256, -128, 127), bits));
    for (size_t rows = 1; rows <= kMaxRows; ++rows) {
      for (const size_t tiles : {1, 2, 3, 4, 7, 70}) {
        const Guarded<uint8_t> src(random.integers<uint8_t>(tiles * 8 * bits, 0, 255));
        const Rows<uint8_t> lhs(1, rows,
                                [&] { return random.integers<uint8_t>(tiles * kTileK, 0, 255); });
        for (const int accumulate : {0, 1}) {
          comparison->results(
              random.integers<int32_t>((rows - 1) * kPanelN + kTileN, -1000, 1000),
              text_of("bits, rows, tiles, accumulate", bits, rows, tiles, accumulate),
              [&](const AfpqKernels& kernels, int32_t* dst) {
                kernels.gemm_s32_u8_afp(lhs.pointers.data(), rows, src.data(), tiles, bits,
                                        table.data(), accumulate, dst);
              });
        }
      }
    }
  }
}

void compare_words(Comparison* comparison) {
  comparison->begin("gemm_s32_s16_s16");
  Random random(2);
  compare_gemm<int16_t, int32_t, int16_t>(
      comparison, [&](size_t count) { return random.integers<int16_t>(count, -32768, 32767); },
      [&](size_t count) { return random.integers<int16_t>(count, -32767, 32767); },
      [&](size_t count) { return random.integers<int32_t>(count, INT32_MIN, INT32_MAX); },
      [](const AfpqKernels& kernels, const int16_t* const* lhs, const GemmShape& shape,
         const int16_t* rhs, size_t rhs_tiles, size_t rows, size_t blocks, int accumulate,
         int32_t* dst) {
        kernels.gemm_s32_s16_s16(lhs, shape.taps, shape.tiles, rhs, rhs_tiles, rows, blocks,
                                 accumulate, dst);
      });
}

void compare_floats(Comparison* comparison) {
  comparison->begin("gemm_f32_f32_f32");
  Random random(3);
  const auto numbers = [&](size_t count) { return random.numbers(count); };
  compare_gemm<float, float, float>(comparison, numbers, numbers, numbers,
                                    [](const AfpqKernels& kernels, const float* const* lhs,
                                       const GemmShape& shape, const float* rhs, size_t rhs_tiles,
                                       size_t rows, size_t blocks, int accumulate, float* dst) {
                                      kernels.gemm_f32_f32_f32(lhs, shape.taps, shape.tiles, rhs,
                                                               rhs_tiles, rows, blocks, accumulate,
                                                               dst);
                                    });
}

void compare_depthwise(Comparison* comparison) {
  comparison->begin("depthwise_s32_u8_s16");
  Random random(4);
  for (const size_t taps : {1, 2, 3, 8, 9, 10, 25}) {
    const int limit = taps % 3 == 0 ? 127 : taps % 3 == 1 ? 16384 : 254;
    for (size_t columns = 1; columns <= 5; ++columns) {
      const size_t blocks = 1 + (columns + taps) % kPanelBlocks, tiles = (taps + 3) / 4;
      const size_t step = blocks * kTileN + columns % 3, lines = 1 + columns % 3;
      const size_t line_step = (columns + 1) * step, pixels = lines * columns;
      const Rows<uint8_t> lhs(taps, 1, [&] {
        return random.integers<uint8_t>((lines - 1) * line_step + columns * step, 0, 255);
      });
      std::vector<const uint8_t*> pointers;
      for (size_t t = 0; t < taps; ++t) pointers.push_back(lhs.pointers[t * kMaxRows]);
      std::vector<int16_t> weights =
          random.integers<int16_t>(blocks * (tiles + 1) * kTileCodes, -limit, limit);
      for (size_t b = 0; taps % 2 && b < blocks; ++b) {  // behind the last tap
        for (size_t c = 0; c < kTileN; ++c)
          weights[b * (tiles + 1) * kTileCodes + taps / 2 * 2 * kTileN + 2 * c + 1] = 0;
      }
      const Guarded<int16_t> rhs(weights);
      comparison->results(random.integers<int32_t>(pixels * kPanelN, -9, 9),
                          text_of("taps, columns, blocks", taps, columns, blocks),
                          [&](const AfpqKernels& kernels, int32_t* dst) {
                            kernels.depthwise_s32_u8_s16(pointers.data(), step, line_step, taps,
                                                         rhs.data(), tiles + 1, lines, columns,
                                                         blocks, dst);
                          });
    }
  }
}

template <typename Lhs, typename Rhs>
void compare_pixels(Comparison* comparison, const char* name, int limit, bool high_plane,
                    void (*AfpqKernels::*gemm)(const AfpqPixels*)) {
  comparison->begin(name);
  Random random(5);
  constexpr bool kWords = sizeof(Lhs) == 2;
  for (const size_t tiles : {1, 2, 5, 12, 40}) {
    for (const size_t pixels : {1, 3, 4, 5, 15, 16, 17, 31, 48}) {
      // Taps share groups, and the last columns of a row are not written.
      const std::vector<size_t> taps =
          tiles % 4 ? std::vector<size_t>{0} : std::vector<size_t>{0, 1, 9, 21};
      const size_t pitch = pixels > 4 ? pixels / 2 : pixels, row = (pitch + 1) / 2;
      const size_t stride = (pixels + 15) / 16 * 16 + pixels % 2 * 16 + taps.back();
      const size_t width = pixels / pitch * row + std::min(pixels % pitch, row) + 3;
      const Guarded<Lhs> lhs(random.integers<Lhs>(tiles / taps.size() * stride * kTileK,
                                                  kWords ? -16384 : 0, kWords ? 16384 : 255));
      const auto weights = [&] { return random.integers<Rhs>(tiles * kTileCodes, -limit, limit); };
      const Guarded<Rhs> rhs(weights()), rhs_high(weights());
      for (const size_t channels : {1, 2, 3, 4, 7, 16}) {
        const Guarded<int32_t> sums(random.integers<int32_t>(channels, -3000, 3000));
        const Guarded<int32_t> sums_high(random.integers<int32_t>(channels, -3000, 3000));
        const Guarded<float> scales(random.numbers(channels)), bias(random.numbers(channels));
        for (const bool high : {false, true}) {
          if (high && !high_plane) continue;
          const bool clamped = (pixels + channels) % 2;
          AfpqPixels p = {lhs.data(),
                          taps.data(),
                          taps.size(),
                          stride,
                          rhs.data(),
                          high ? rhs_high.data() : nullptr,
                          tiles,
                          pixels,
                          pitch,
                          row,
                          channels,
                          limit,
                          131,
                          sums.data(),
                          high ? sums_high.data() : nullptr,
                          scales.data(),
                          bias.data(),
                          0.01f,
                          clamped ? -0.5f : -__builtin_inff(),
                          clamped ? 6.0f : __builtin_inff(),
                          nullptr,
                          width};
          comparison->results(
              random.numbers(channels * width),
              text_of("tiles, pixels, channels, high", tiles, pixels, channels, int{high}),
              [&](const AfpqKernels& kernels, float* dst) {
                p.dst = dst;
                (kernels.*gemm)(&p);
              });
        }
      }
    }
  }
}

}  // namespace

void compare_products(Comparison* comparison) {
  Random random(0);
  compare_expand(comparison, "expand_s8_afp", &AfpqKernels::expand_s8_afp,
                 random.integers<int8_t>(256, -128, 127));
  compare_expand(comparison, "expand_s16_afp", &AfpqKernels::expand_s16_afp,
                 random.integers<int16_t>(256, -32768, 32767));
  compare_expand(comparison, "expand_f32_afp", &AfpqKernels::expand_f32_afp, random.numbers(256));
  compare_bytes(comparison);
  compare_codes(comparison);
  compare_words(comparison);
  compare_depthwise(comparison);
  compare_floats(comparison);
  const int limit = std::min(comparison->table().a8_byte_limit, 127);
  compare_pixels<uint8_t, int8_t>(comparison, "gemm_pixels_f32_u8_s8", limit, false,
                                  &AfpqKernels::gemm_pixels_f32_u8_s8);
  compare_pixels<int16_t, int16_t>(comparison, "gemm_pixels_f32_s16_s16", 300, true,
                                   &AfpqKernels::gemm_pixels_f32_s16_s16);
}

}  // namespace afpq::tests
