// Kernels at the end of a layer, and those that move or add floats of planes, compared with the
// scalar ones.
#include <algorithm>

#include "tests/check.h"

namespace afpq::tests {
namespace {

constexpr size_t kRowCounts[] = {1, 2, 3, 4, 5, 7, 48};
constexpr size_t kChannelCounts[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64};

// case_of(rows, channels, bounds), the bounds in turn.
template <typename Case>
void for_ends(const Case& case_of) {
  size_t turn = 0;
  for (const size_t rows : kRowCounts)
    for (const size_t channels : kChannelCounts) case_of(rows, channels, kBounds[turn++ % 3]);
}

// Sums of a layer and what turns them into floats.
struct Sums {
  Guarded<int32_t> low, high, low_columns, high_columns, zero_points;
  Guarded<float> scales;

  Sums(Random* random, size_t rows, size_t channels, int lhs_planes)
      : low(random->integers<int32_t>(rows * lhs_planes * kPanelN, -(1 << 29), 1 << 29)),
        high(random->integers<int32_t>(rows * lhs_planes * kPanelN, -(1 << 29), 1 << 29)),
        low_columns(random->integers<int32_t>(channels, -(1 << 21), 1 << 21)),
        high_columns(random->integers<int32_t>(channels, -(1 << 21), 1 << 21)),
        zero_points(random->integers<int32_t>(rows, 0, lhs_planes == 1 ? 255 : 65535)),
        scales(random->numbers(channels)) {}

  AfpqCombine arguments(size_t rows, size_t channels, int lhs_planes, int rhs_planes,
                        int accumulate, float* dst) const {
    return {{low.data(), high.data()},
            {low_columns.data(), high_columns.data()},
            zero_points.data(),
            scales.data(),
            dst,
            rows,
            channels,
            lhs_planes,
            rhs_planes,
            accumulate};
  }
};

void compare_combine(Comparison* comparison) {
  comparison->begin("combine_f32_s32");
  Random random(20);
  for_ends([&](size_t rows, size_t channels, const Bounds&) {
    for (const int lhs_planes : {1, 2}) {
      const Sums sums(&random, rows, channels, lhs_planes);
      for (const int rhs_planes : {1, 2}) {
        for (const int accumulate : {0, 1}) {
          comparison->results(random.numbers(rows * kPanelN),
                              text_of("rows, channels, planes, accumulate", rows, channels,
                                      lhs_planes, rhs_planes, accumulate),
                              [&](const AfpqKernels& kernels, float* dst) {
                                const AfpqCombine args = sums.arguments(
                                    rows, channels, lhs_planes, rhs_planes, accumulate, dst);
                                kernels.combine_f32_s32(&args);
                              });
        }
      }
    }
  });
}

// Products of rows of a layer, some of them no numbers.
std::vector<float> products(Random* random, size_t rows) {
  std::vector<float> result = random->numbers(rows * kPanelN);
  constexpr float kSpecial[] = {kNan, kInfinity, -kInfinity, -0.0f, 1e30f};
  for (size_t i = 3; i < result.size(); i += 7) result[i] = kSpecial[i % 5];
  for (size_t r = 0; r < rows; ++r) result[r * kPanelN] = -0.0f;
  return result;
}

void compare_store(Comparison* comparison) {
  comparison->begin("store_f32");
  Random random(21);
  for_ends([&](size_t rows, size_t channels, const Bounds& bounds) {
    const Guarded<float> src(products(&random, rows)), scales(random.numbers(rows));
    std::vector<float> offsets = random.numbers(channels);
    offsets[0] = -0.0f;
    const Guarded<float> bias(offsets);
    for (const bool planes : {false, true}) {
      AfpqStore args = {src.data(), scales.data(), bias.data(), nullptr, rows, channels, 0,
                        0,          bounds.low,    bounds.high};
      args.row_stride = planes ? 1 : channels + 3;
      args.channel_stride = planes ? rows + 3 : 1;
      const size_t size =
          planes ? (channels - 1) * (rows + 3) + rows : (rows - 1) * (channels + 3) + channels;
      comparison->results(std::vector<float>(size, 7.0f),
                          text_of("rows, channels, planes", rows, channels, int{planes}),
                          [&](const AfpqKernels& kernels, float* dst) {
                            args.dst = dst;
                            kernels.store_f32(&args);
                          });
    }
  });
}

void compare_finish_floats(Comparison* comparison) {
  comparison->begin("finish_f32_s32");
  Random random(26);
  for_ends([&](size_t rows, size_t channels, const Bounds& bounds) {
    const Guarded<float> scales(random.numbers(rows)), bias(random.numbers(channels));
    for (const int lhs_planes : {1, 2}) {
      const Sums sums(&random, rows, channels, lhs_planes);
      for (const int rhs_planes : {1, 2}) {
        for (const bool planes : {false, true}) {
          AfpqFinishFloats args = {
              sums.arguments(rows, channels, lhs_planes, rhs_planes, 0, nullptr),
              {nullptr, scales.data(), bias.data(), nullptr, rows, channels, 0, 0, bounds.low,
               bounds.high}};
          args.store.row_stride = planes ? 1 : channels + 3;
          args.store.channel_stride = planes ? rows + 3 : 1;
          const size_t size =
              planes ? (channels - 1) * (rows + 3) + rows : (rows - 1) * (channels + 3) + channels;
          comparison->results(std::vector<float>(size, 7.0f),
                              text_of("rows, channels, lhs_planes, rhs_planes, planes", rows,
                                      channels, lhs_planes, rhs_planes, int{planes}),
                              [&](const AfpqKernels& kernels, float* dst) {
                                args.store.dst = dst;
                                kernels.finish_f32_s32(&args);
                              });
        }
      }
    }
  });
}

// A float format of bytes.
AfpqQuantize quantize_of(float low, float high, int mantissa_bits) {
  AfpqQuantize q = {};
  q.num_planes = 1;
  q.zero_point = low < 0 ? 128 : 0;
  q.scale = 0.0317382812f;
  q.low = low;
  q.high = high;
  q.mantissa_bits = mantissa_bits;
  return q;
}
const AfpqQuantize kFormats[] = {quantize_of(-127, 127, 7), quantize_of(0, 255, 7),
                                 quantize_of(-124, 124, 4), quantize_of(0, 252, 5)};

// Everything but the source of products.
struct ByteEnd {
  Guarded<float> row_scales, bias;
  Guarded<uint8_t> residual;
  size_t stride;

  ByteEnd(Random* random, size_t rows, size_t channels)
      : row_scales(random->numbers(rows)),
        bias(random->numbers(channels)),
        residual(random->integers<uint8_t>((rows - 1) * (channels + 5) + channels, 0, 255)),
        stride(channels + 5) {}

  size_t size(size_t rows, size_t channels) const { return (rows - 1) * stride + channels; }
  AfpqStoreBytes arguments(size_t rows, size_t channels, const Bounds& bounds,
                           bool with_residual) const {
    AfpqStoreBytes args = {};
    args.row_scales = row_scales.data();
    args.bias = bias.data();
    args.residual = with_residual ? residual.data() : nullptr;
    args.residual_zero = 128;
    args.residual_scale = 0.046875f;
    args.num_rows = rows;
    args.num_channels = channels;
    args.stride = stride;
    args.low = bounds.low;
    args.high = bounds.high;
    return args;
  }
};

void compare_store_bytes(Comparison* comparison) {
  comparison->begin("store_u8_f32");
  Random random(22);
  for_ends([&](size_t rows, size_t channels, const Bounds& bounds) {
    const Guarded<float> src(products(&random, rows));
    const ByteEnd end(&random, rows, channels);
    for (const bool residual : {false, true}) {
      AfpqStoreBytes args = end.arguments(rows, channels, bounds, residual);
      args.src = src.data();
      const std::string what = text_of("rows, channels, residual", rows, channels, int{residual});
      for (const AfpqQuantize& format : kFormats) {
        args.quantize = &format;
        comparison->results(std::vector<uint8_t>(end.size(rows, channels), 7), what,
                            [&](const AfpqKernels& kernels, uint8_t* dst) {
                              args.dst = dst;
                              kernels.store_u8_f32(&args);
                            });
      }
      comparison->results(std::vector<float>(rows * kPanelN, 7.0f), what + " to floats",
                          [&](const AfpqKernels& kernels, float* dst) {
                            AfpqStoreBytes to_floats = args;
                            to_floats.floats = dst;
                            kernels.store_u8_f32(&to_floats);
                          });
    }
  });
}

void compare_finish(Comparison* comparison) {
  comparison->begin("finish_u8_s32");
  Random random(23);
  for_ends([&](size_t rows, size_t channels, const Bounds& bounds) {
    const ByteEnd end(&random, rows, channels);
    Sums sums(&random, rows, channels, 1);
    for (size_t c = 0; c < channels; ++c) sums.scales.data()[c] *= 0x1p-28f;
    for (const int rhs_planes : {1, 2}) {
      for (const bool residual : {false, true}) {
        for (const AfpqQuantize& format : kFormats) {
          AfpqFinish args = {sums.arguments(rows, channels, 1, rhs_planes, 0, nullptr),
                             end.arguments(rows, channels, bounds, residual)};
          args.store.quantize = &format;
          comparison->results(std::vector<uint8_t>(end.size(rows, channels), 7),
                              text_of("rows, channels, planes, residual", rows, channels,
                                      rhs_planes, int{residual}),
                              [&](const AfpqKernels& kernels, uint8_t* dst) {
                                args.store.dst = dst;
                                kernels.finish_u8_s32(&args);
                              });
        }
      }
    }
  });
}

void compare_pick(Comparison* comparison) {
  comparison->begin("pick_f32");
  Random random(24);
  for (const size_t step : {1, 2, 3, 4}) {
    for (size_t count = 1; count <= 20; ++count) {
      const size_t rows = 1 + count % 3, row = (count - 1) * step + 1, stride = row + count % 2;
      const Guarded<float> src(random.numbers((rows - 1) * stride + row));
      comparison->results(std::vector<float>((rows - 1) * (count + 2) + count, 7.0f),
                          text_of("step, count", step, count),
                          [&](const AfpqKernels& kernels, float* dst) {
                            kernels.pick_f32(src.data(), stride, step, rows, count, count + 2, dst);
                          });
    }
  }
}

void compare_add(Comparison* comparison) {
  comparison->begin("add_clamp_f32");
  Random random(26);
  for (size_t count = 1; count <= 40; ++count) {
    const size_t channels = 1 + count % 3, stride = count + count % 2;
    const size_t size = (channels - 1) * stride + count;
    const Guarded<float> src(random.numbers(size));
    const std::vector<float> before = random.numbers(size);
    comparison->results(
        before, text_of("count", count), [&](const AfpqKernels& kernels, float* dst) {
          kernels.add_clamp_f32(src.data(), stride, channels, count, -0.5f, 1.0f, dst);
        });
  }
}

}  // namespace

void compare_ends(Comparison* comparison) {
  compare_combine(comparison);
  compare_store(comparison);
  compare_finish_floats(comparison);
  compare_store_bytes(comparison);
  compare_finish(comparison);
  compare_add(comparison);
  compare_pick(comparison);
}

}  // namespace afpq::tests
