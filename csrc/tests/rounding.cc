// Kernels that find ranges, round floats and turn channel planes into rows, compared with the
// scalar ones.
#include <algorithm>
#include <cmath>

#include "tests/check.h"

namespace afpq::tests {
namespace {

void compare_range(Comparison* comparison) {
  comparison->begin("range_f32");
  Random random(10);
  for (size_t count = 0; count <= 40; ++count) {
    for (const float special : {0.5f, -0.0f, kNan, -kNan, kInfinity, -kInfinity}) {
      std::vector<float> values = random.numbers(count);
      if (count > 0) values[static_cast<size_t>(random.in(0, count - 1))] = special;
      if (count % 5 == 1)  // one sign, so that 0 is an end
        for (float& value : values) value = std::fabs(value);
      const Guarded<float> src(values);
      comparison->results(std::vector<uint32_t>(2), text_of("count, special", count, special),
                          [&](const AfpqKernels& kernels, uint32_t* dst) {
                            AfpqRange range;
                            kernels.range_f32(src.data(), count, &range);
                            dst[0] = range.below;
                            dst[1] = static_cast<uint32_t>(range.above);
                          });
    }
  }
}

// Fixed point of one or two planes, or a float format.
struct Rounding {
  float inverse_scale;
  int zero_point, planes;
  float scale, low, high;
  int mantissa_bits;

  AfpqQuantize quantize() const {
    AfpqQuantize q = {};
    q.inverse_scale = inverse_scale;
    q.zero_point = zero_point;
    q.num_planes = planes;
    q.scale = scale;
    q.low = low;
    q.high = high;
    q.mantissa_bits = mantissa_bits;
    return q;
  }
};

constexpr Rounding kRoundings[] = {
    {100.0f, 131, 1, 0, 0, 0, 0},
    {0.0f, 0, 1, 0, 0, 0, 0},
    {9000.0f, 32768, 2, 0, 0, 0, 0},
    {20000.0f, 0, 2, 0, 0, 0, 0},
    {0, 128, 1, 0.0317382812f, -127, 127, 7},  // e0m7
    {0, 0, 1, 0.0155639648f, 0, 255, 7},       // ue1m7
    {0, 128, 1, 0.0463867188f, -124, 124, 4},  // e2m4
    {0, 0, 1, 0.5f, 0, 252, 5},                // ue2m5
    {0, 128, 1, 1e-38f, -12, 12, 1},           // e2m1, beyond the range almost everywhere
};

// Numbers, ties, and, unless they would have no meaning, what is none or too large.
std::vector<float> sources(Random* random, size_t count, const Rounding& rounding, bool any) {
  std::vector<float> values = random->numbers(count);
  const float step = rounding.scale > 0           ? rounding.scale
                     : rounding.inverse_scale > 0 ? 1.0f / rounding.inverse_scale
                                                  : 1.0f;
  constexpr float kSpecial[] = {kNan, kInfinity, -kInfinity, -0.0f, 1e30f, -1e30f, 1e-40f};
  for (float& value : values) {
    const int64_t kind = random->in(0, 9);
    if (kind < 3) value = (static_cast<float>(random->in(-300, 300)) + 0.5f) * step;
    if (kind == 3)
      value = std::nextafter((static_cast<float>(random->in(0, 130)) + 0.5f) * step, 9.0f);
    if (kind == 4 && any) value = kSpecial[random->in(0, 6)];
  }
  return values;
}

using Planes = std::vector<uint8_t>;

// Rows: `words` are written, or `planes`.
void compare_rows(Comparison* comparison) {
  for (const bool words : {false, true}) {
    comparison->begin(words ? "quantize_s16_f32" : "quantize_u8_f32");
    Random random(11);
    for (const Rounding& rounding : kRoundings) {
      for (size_t count = 0; count <= 70; count += 1 + count / 20) {
        const bool any = !words || rounding.scale > 0;
        const Guarded<float> src(sources(&random, count, rounding, any));
        AfpqQuantize q = rounding.quantize();
        const std::string what = text_of("planes, scale, count", q.num_planes, q.scale, count);
        if (words) {
          comparison->results(std::vector<int16_t>(count), what,
                              [&](const AfpqKernels& kernels, int16_t* dst) {
                                q.words = dst;
                                kernels.quantize_s16_f32(src.data(), count, &q);
                              });
          continue;
        }
        comparison->results(Planes(2 * count, 7), what,
                            [&](const AfpqKernels& kernels, uint8_t* dst) {
                              // The last plane is the one that ends at the guard.
                              q.planes[0] = dst + (q.num_planes == 1 ? count : 0);
                              q.planes[1] = dst + count;
                              kernels.quantize_u8_f32(src.data(), count, &q);
                            });
      }
    }
  }
}

constexpr size_t kChannels[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20, 33, 48};
constexpr size_t kCounts[] = {1, 2, 3, 4, 5, 7, 8, 9, 16, 21};

// case_of(channels, count, stride) for blocks of channel planes.
template <typename Case>
void for_planes(size_t multiple, const Case& case_of) {
  for (const size_t channels : kChannels) {
    if (channels % multiple) continue;
    for (const size_t count : kCounts) case_of(channels, count, count + channels % 3);
  }
}

// Channel planes that end where the last one does.
size_t plane_elements(size_t channels, size_t count, size_t stride) {
  return (channels - 1) * stride + count;
}

void compare_transposes(Comparison* comparison) {
  for (const bool words : {false, true}) {
    comparison->begin(words ? "quantize_transpose_s16_f32" : "quantize_transpose_u8_f32");
    Random random(12);
    for (const Rounding& rounding : kRoundings) {
      for_planes(1, [&](size_t channels, size_t count, size_t stride) {
        const Guarded<float> src(sources(&random, plane_elements(channels, count, stride), rounding,
                                         !words || rounding.scale > 0));
        AfpqQuantize q = rounding.quantize();
        const size_t size = channels * count;
        const std::string what =
            text_of("planes, scale, channels, count", q.num_planes, q.scale, channels, count);
        if (words) {
          comparison->results(
              std::vector<int16_t>(size), what, [&](const AfpqKernels& kernels, int16_t* dst) {
                q.words = dst;
                kernels.quantize_transpose_s16_f32(src.data(), stride, channels, count, &q);
              });
          return;
        }
        comparison->results(
            Planes(2 * size, 7), what, [&](const AfpqKernels& kernels, uint8_t* dst) {
              q.planes[0] = dst + (q.num_planes == 1 ? size : 0);
              q.planes[1] = dst + size;
              kernels.quantize_transpose_u8_f32(src.data(), stride, channels, count, &q);
            });
      });
    }
  }
}

void compare_pixel_rows(Comparison* comparison) {
  for (const bool words : {false, true}) {
    comparison->begin(words ? "quantize_pixels_s16_f32" : "quantize_pixels_u8_f32");
    Random random(13);
    for (const Rounding& rounding : kRoundings) {
      if (!words && rounding.planes == 2) continue;  // bytes have one plane
      for_planes(4, [&](size_t channels, size_t size, size_t more) {
        // Rows with a gap between them, or without; the last one ends with the last pixel.
        const size_t rows = 1 + channels / 4 % 3, pitch = size + channels / 4 % 2;
        const size_t count = rows * size, stride = rows * more;
        const size_t reach = (rows - 1) * pitch + size, pixels = reach + 5;
        const Guarded<float> src(sources(&random, plane_elements(channels, count, stride), rounding,
                                         !words || rounding.scale > 0));
        AfpqQuantize q = rounding.quantize();
        const AfpqPixelSource source = {src.data(), stride, channels, rows, size, pitch, pixels};
        comparison->results(
            Planes(4 * plane_elements(channels / (words ? 2 : 4), reach, pixels), 7),
            text_of("planes, scale, channels, rows, size", q.num_planes, q.scale, channels, rows,
                    size),
            [&](const AfpqKernels& kernels, uint8_t* dst) {
              q.planes[0] = dst;
              q.words = reinterpret_cast<int16_t*>(dst);
              (words ? kernels.quantize_pixels_s16_f32 : kernels.quantize_pixels_u8_f32)(&source,
                                                                                         &q);
            });
      });
    }
  }
}

void compare_float_transpose(Comparison* comparison) {
  comparison->begin("transpose_f32");
  Random random(14);
  for_planes(1, [&](size_t channels, size_t count, size_t stride) {
    const Guarded<float> src(random.numbers(plane_elements(channels, count, stride)));
    comparison->results(std::vector<float>(channels * count),
                        text_of("channels, count", channels, count),
                        [&](const AfpqKernels& kernels, float* dst) {
                          kernels.transpose_f32(src.data(), stride, channels, count, dst);
                        });
  });
}

}  // namespace

void compare_rounding(Comparison* comparison) {
  compare_range(comparison);
  compare_rows(comparison);
  compare_transposes(comparison);
  compare_pixel_rows(comparison);
  compare_float_transpose(comparison);
}

}  // namespace afpq::tests
