// Convolutions of floats, from planes or from channels that lie together, compared with the scalar
// ones.
#include <algorithm>

#include "tests/check.h"

namespace afpq::tests {
namespace {

struct PlanarShape {
  size_t taps, channels, rows, columns, step;  // taps x taps; of the source
  ptrdiff_t pad;
  size_t dilation;
  bool shared;  // all channels read the same two planes
};
constexpr PlanarShape kPlanarShapes[] = {
    {3, 5, 9, 7, 1, 1, 1, false},   {3, 16, 12, 40, 1, 1, 1, false}, {3, 4, 11, 37, 2, 1, 1, false},
    {5, 3, 17, 19, 1, 2, 1, false}, {3, 2, 20, 33, 3, 1, 1, false},  {1, 6, 5, 6, 1, 0, 1, false},
    {3, 7, 13, 70, 1, 2, 2, false}, {3, 16, 10, 35, 2, 1, 1, true},  {2, 9, 6, 50, 1, 0, 1, true},
    {3, 1, 2, 2, 1, 3, 1, false},
};

void compare_planar(Comparison* comparison) {
  comparison->begin("planar_f32");
  Random random(25);
  for (const PlanarShape& shape : kPlanarShapes) {
    const size_t stride = shape.columns + 1, plane = shape.rows * stride;
    const size_t planes = shape.shared ? 2 : 1;
    std::vector<AfpqTap> taps;
    for (size_t i = 0; i < planes; ++i) {
      for (size_t y = 0; y < shape.taps; ++y) {
        for (size_t x = 0; x < shape.taps; ++x)
          taps.push_back({i * plane, static_cast<ptrdiff_t>(y * shape.dilation) - shape.pad,
                          static_cast<ptrdiff_t>(x * shape.dilation) - shape.pad});
      }
    }
    std::vector<float> integers(taps.size() * kTileN);
    for (float& weight : integers) weight = static_cast<float>(random.in(-60, 60));
    const size_t total = shape.shared ? planes : shape.channels;
    const Guarded<float> src(random.numbers(total * plane - 1)), weights(integers);
    const Guarded<float> scales(random.numbers(shape.channels)),
        bias(random.numbers(shape.channels));
    const auto out = [&](size_t in) {
      return (in + 2 * static_cast<size_t>(shape.pad) - (shape.taps - 1) * shape.dilation - 1) /
                 shape.step +
             1;
    };
    const size_t rows = out(shape.rows), columns = out(shape.columns);
    const size_t channel = rows * (columns + 2);
    for (const Bounds& bounds : kBounds) {
      AfpqPlanar args = {src.data(),    taps.data(),    weights.data(),
                         scales.data(), bias.data(),    nullptr,
                         taps.size(),   shape.channels, shape.shared ? 0 : plane,
                         channel,       shape.rows,     shape.columns,
                         stride,        shape.step,     shape.step,
                         rows,          columns,        columns + 2,
                         bounds.low,    bounds.high};
      comparison->results(std::vector<float>(shape.channels * channel - 2, 7.0f),
                          text_of("taps, channels, step", shape.taps, shape.channels, shape.step),
                          [&](const AfpqKernels& kernels, float* dst) {
                            args.dst = dst;
                            kernels.planar_f32(&args);
                          });
    }
  }
}

void compare_planar_rows(Comparison* comparison) {
  comparison->begin("planar_rows_f32");
  Random random(27);
  for (const size_t channels : {1, 9, 16, 24, 40, 64}) {
    for (const size_t pixels : {1, 5, 6, 13}) {
      const size_t count = 3 + pixels * channels % 25;
      const size_t tiles = (count + kTileK - 1) / kTileK, blocks = (channels + kTileN - 1) / kTileN;
      const std::vector<size_t> taps = random.integers<size_t>(count, 0, 50);
      const std::vector<size_t> places = random.integers<size_t>(pixels, 0, 30);
      const Guarded<float> src(random.numbers(*std::max_element(taps.begin(), taps.end()) +
                                              *std::max_element(places.begin(), places.end()) + 1));
      const Guarded<float> weights(random.numbers(blocks * tiles * kTileCodes));
      const Guarded<float> scales(random.numbers(channels)), bias(random.numbers(channels));
      comparison->results(std::vector<float>((pixels - 1) * kPanelN + channels, 7.0f),
                          text_of("channels, pixels", channels, pixels),
                          [&](const AfpqKernels& kernels, float* dst) {
                            const AfpqPlanarRows args = {
                                src.data(),    taps.data(), places.data(), weights.data(),
                                scales.data(), bias.data(), dst,           count,
                                tiles,         pixels,      channels};
                            kernels.planar_rows_f32(&args);
                          });
    }
  }
}

void compare_depthwise_floats(Comparison* comparison) {
  comparison->begin("depthwise_f32");
  Random random(28);
  for (const size_t columns : {1, 2, 3, 5, 6, 7, 8, 9, 12, 14}) {
    for (const size_t count : {1, 4, 9, 0}) {
      // Of 0, they are 3x3 next to each other.
      const size_t lines = 1 + columns % 4, step = count ? 16 + columns % 2 * 16 : 16;
      const size_t line_step = (columns + 2) * step;
      std::vector<size_t> taps = random.integers<size_t>(count ? count : 9, 0, 200);
      for (size_t t = 0; count == 0 && t < 9; ++t) taps[t] = t / 3 * line_step + t % 3 * kTileN;
      const Guarded<float> src(random.numbers(*std::max_element(taps.begin(), taps.end()) +
                                              (lines - 1) * line_step + (columns - 1) * step +
                                              kTileN));
      const Guarded<float> weights(random.numbers(taps.size() * kTileN));
      const Guarded<float> scales(random.numbers(kTileN)), bias(random.numbers(kTileN));
      const bool clamped = columns % 2;
      comparison->results(std::vector<float>(lines * columns * kTileN),
                          text_of("columns, taps", columns, count),
                          [&](const AfpqKernels& kernels, float* dst) {
                            const AfpqDepthwise args = {
                                src.data(),
                                taps.data(),
                                weights.data(),
                                scales.data(),
                                bias.data(),
                                dst,
                                taps.size(),
                                step,
                                line_step,
                                lines,
                                columns,
                                clamped ? -0.5f : -__builtin_inff(),
                                clamped ? 6.0f : __builtin_inff(),
                            };
                            kernels.depthwise_f32(&args);
                          });
    }
  }
}

}  // namespace

void compare_planar_kernels(Comparison* comparison) {
  compare_planar(comparison);
  compare_planar_rows(comparison);
  compare_depthwise_floats(comparison);
}

}  // namespace afpq::tests
