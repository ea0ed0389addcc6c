// Matrix products, convolutions and tables from end to end, on both tables; and one checksum of all
// results, which every processor must reach.
#include "drivers/conv.h"
#include "drivers/gather.h"
#include "drivers/matmul.h"
#include "tests/check.h"

namespace afpq::tests {
namespace {

// FNV-1a over the bytes of results.
class Checksum {
 public:
  template <typename T>
  void add(const std::vector<T>& values) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i)
      value_ = (value_ ^ bytes[i]) * 0x100000001b3;
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325;
};

// A weight of random codes as it is stored, and its scales.
struct Stored {
  Format format;
  size_t n, k, group_size;
  std::vector<unsigned> codes;  // [n][k]
  std::vector<uint8_t> data;
  std::vector<float> scales;

  Stored(Random* random, const char* text, size_t n_, size_t k_, size_t group_size_ = 0)
      : n(n_), k(k_), group_size(group_size_) {
    if (!parse_format(text, &format)) std::abort();
    const unsigned bits = format.bits();
    codes = random->integers<unsigned>(n * k, 0, (1 << bits) - 1);
    data.assign(packed_bytes(n, k, bits), 0);
    for (size_t i = 0; i < n * k; ++i) put(i / k, i % k, codes[i]);
    for (size_t i = 0; i < (group_size ? ceil_div(k, group_size) : 1) * n; ++i)
      scales.push_back(static_cast<float>(random->in(128, 255)) * 0x1p-12f);
  }

  void put(size_t channel, size_t step, unsigned code) {
    const unsigned bits = format.bits();
    const size_t tile = channel / kTileN * ceil_div(k, kTileK) + step / kTileK;
    const size_t first = (tile * kTileCodes + channel % kTileN * kTileK + step % kTileK) * bits;
    for (size_t b = 0; b < bits; ++b)
      data[(first + b) / 8] |= static_cast<uint8_t>((code >> b & 1) << (first + b) % 8);
  }

  PackedWeight load(const AfpqKernels& kernels, size_t multiple, bool integer_sums) const {
    PackedWeight weight;
    load_weight(kernels, format, data.data(), n, k, scales.data(), scales.size(), group_size,
                multiple, integer_sums, &weight);
    return weight;
  }
};

LhsRounding rounding_of(Activations mode, const char* format = nullptr) {
  LhsRounding rounding;
  rounding.mode = mode;
  if (format == nullptr) return rounding;
  if (!parse_format(format, &rounding.format)) std::abort();
  rounding.scale = 0x1.04p-5f;
  return rounding;
}

const LhsRounding kRoundings[] = {
    rounding_of(Activations::kF32), rounding_of(Activations::kA8), rounding_of(Activations::kA16),
    rounding_of(Activations::kA8, "e0m7"), rounding_of(Activations::kA8, "ue2m5")};
constexpr const char* kFormats[] = {"e0m1", "e2m1", "e2m2", "e2m3", "e0m7",
                                    "e2m5", "e3m3", "e4m1", "e5m2"};

void compare_matmul(Comparison* comparison, Checksum* checksum) {
  comparison->begin("matmul");
  Random random(30);
  constexpr size_t kN = 75, kK = 130;
  for (const char* format : kFormats) {
    for (const size_t group_size : {0, 32}) {
      const Stored stored(&random, format, kN, kK, group_size);
      const std::vector<float> bias = random.numbers(kN);
      for (const LhsRounding& rounding : kRoundings) {
        for (const size_t m : {1, 7, 53}) {
          const Guarded<float> lhs(random.numbers(m * kK)), residual(random.numbers(m * kN));
          const float low = m == 7 ? 0.0f : -kInfinity;
          checksum->add(comparison->results(
              std::vector<float>(m * kN),
              format + text_of(" group, mode, m", group_size, static_cast<int>(rounding.mode), m),
              [&](const AfpqKernels& kernels, float* dst) {
                const PackedWeight weight =
                    stored.load(kernels, 1, rounding.mode != Activations::kF32);
                matmul({&kernels, &weight, rounding, bias.data(), low, kInfinity}, lhs.data(), m,
                       m == 1 ? nullptr : residual.data(), dst, serial());
              }));
        }
      }
    }
  }
}

// Square kernels, strides, dilations and pads on the last `axes` axes.
ConvShape shape_of(size_t channels_in, size_t channels_out, size_t groups, size_t kernel,
                   size_t stride, size_t dilation, size_t pad, size_t axes,
                   const size_t (&extents)[3]) {
  ConvShape shape;
  shape.channels_in = channels_in;
  shape.channels_out = channels_out;
  shape.groups = groups;
  for (size_t axis = 3 - axes; axis < 3; ++axis) {
    shape.in[axis] = extents[axis];
    shape.kernel[axis] = kernel;
    shape.strides[axis] = stride;
    shape.dilations[axis] = dilation;
    shape.pads[axis] = pad;
    shape.out[axis] = (extents[axis] + 2 * pad - (kernel - 1) * dilation - 1) / stride + 1;
  }
  return shape;
}

const ConvShape kShapes[] = {
    shape_of(16, 20, 1, 1, 1, 1, 0, 2, {1, 9, 11}),    // pixels or rows
    shape_of(12, 33, 1, 3, 1, 1, 1, 2, {1, 9, 8}),     // taps in place
    shape_of(10, 17, 1, 3, 2, 1, 1, 2, {1, 11, 9}),    // patches
    shape_of(3, 16, 1, 3, 2, 1, 1, 2, {1, 13, 19}),    // planar, shared planes
    shape_of(20, 20, 20, 3, 1, 1, 1, 2, {1, 12, 21}),  // depthwise
    shape_of(20, 20, 20, 3, 2, 2, 2, 2, {1, 12, 11}),
    shape_of(8, 32, 2, 3, 1, 1, 1, 2, {1, 7, 6}),  // groups of whole tiles
    shape_of(6, 9, 3, 2, 1, 1, 0, 2, {1, 7, 6}),   // small groups
    shape_of(8, 18, 1, 5, 1, 2, 4, 1, {1, 1, 23}),
    shape_of(4, 16, 1, 2, 1, 1, 1, 3, {4, 5, 6}),
};
constexpr size_t kBatch = 2;

// What a convolution reads and writes, as ort/conv_op.cc passes it on.
struct ConvCase {
  const Stored& stored;
  const ConvShape& shape;
  const LhsRounding& rounding;
  const std::vector<float>& bias;

  // A residual is like the results.
  template <typename Result>
  void run(const AfpqKernels& kernels, const ConvSource& src, const Result* residual,
           Result* dst) const {
    const bool planar = conv_is_planar(shape, rounding.scale > 0);
    const size_t multiple = shape.group_in() % kTileK == 0 ? shape.group_in() / kTileK : 1;
    const PackedWeight weight =
        stored.load(kernels, multiple, rounding.mode != Activations::kF32 && !planar);
    const LhsRounding bytes = rounding_of(Activations::kA8, "e0m7");
    const Conv op = {&kernels, &weight, rounding, bias.data(), -3.0f, 3.0f, bytes, bytes};
    ConvTarget target;
    if constexpr (sizeof(Result) == 1) {
      target.bytes = dst;
      target.residual = residual;
    } else {
      target.floats = dst;
      target.float_residual = residual;
    }
    conv(op, shape, src, kBatch, target, serial());
  }
};

void compare_conv(Comparison* comparison, Checksum* checksum) {
  comparison->begin("conv");
  Random random(31);
  size_t turn = 0;
  for (const ConvShape& shape : kShapes) {
    for (const char* format : kFormats) {
      if (turn++ % 2 && format[1] != '2') continue;  // each shape has its own half of the others
      const Stored stored(&random, format, shape.channels_out, shape.num_taps() * shape.group_in());
      const std::vector<float> bias = random.numbers(shape.channels_out);
      const Guarded<float> src(random.numbers(kBatch * shape.channels_in * shape.num_in()));
      const size_t num_out = kBatch * shape.channels_out * shape.num_out();
      const Guarded<float> residual(random.numbers(num_out));
      for (const LhsRounding& rounding : kRoundings) {
        const ConvCase conv_case = {stored, shape, rounding, bias};
        for (const float* added : {static_cast<float*>(nullptr), residual.data()}) {
          checksum->add(comparison->results(
              std::vector<float>(num_out),
              format + text_of(" shape, mode, residual", &shape - kShapes,
                               static_cast<int>(rounding.mode), int{added != nullptr}),
              [&](const AfpqKernels& kernels, float* dst) {
                conv_case.run(kernels, {src.data(), nullptr}, added, dst);
              }));
        }
      }
    }
  }
}

// Bytes to bytes, with and without a residual; and floats to bytes where bytes cannot be read.
void compare_byte_conv(Comparison* comparison, Checksum* checksum) {
  comparison->begin("conv of bytes");
  Random random(32);
  for (const ConvShape& shape : kShapes) {
    for (const char* format : {"e2m1", "e0m7", "e3m3"}) {
      const Stored stored(&random, format, shape.channels_out, shape.num_taps() * shape.group_in());
      const std::vector<float> bias = random.numbers(shape.channels_out);
      const size_t num_in = kBatch * shape.channels_in * shape.num_in();
      const size_t num_out = kBatch * shape.channels_out * shape.num_out();
      const Guarded<uint8_t> bytes(random.integers<uint8_t>(num_in, 1, 255));
      const Guarded<float> floats(random.numbers(num_in));
      const Guarded<uint8_t> residual(random.integers<uint8_t>(num_out, 1, 255));
      const ConvCase conv_case = {stored, shape, kRoundings[3], bias};
      const bool on_floats = conv_is_planar(shape, true);
      const ConvSource src = {on_floats ? floats.data() : nullptr,
                              on_floats ? nullptr : bytes.data()};
      for (const bool added : {false, true}) {
        if (added && on_floats) continue;
        checksum->add(comparison->results(
            std::vector<uint8_t>(num_out),
            format + text_of(" shape, residual", &shape - kShapes, int{added}),
            [&](const AfpqKernels& kernels, uint8_t* dst) {
              conv_case.run(kernels, src, added ? residual.data() : nullptr, dst);
            }));
      }
    }
  }
}

// No kernel has a part in tables: rows are held against the definition, I * scale.
void compare_gather(Comparison* comparison, Checksum* checksum) {
  comparison->begin("gather");
  Random random(33);
  for (const char* format : kFormats) {
    const Stored stored(&random, format, 37, 50);
    const std::vector<int64_t> indices = random.integers<int64_t>(90, -37, 36);
    checksum->add(comparison->results(
        std::vector<float>(indices.size() * stored.k), format,
        [&](const AfpqKernels& kernels, float* dst) {
          if (&kernels == &comparison->table()) {
            const PackedWeight weight = stored.load(kernels, 1, false);
            int64_t bad = 0;
            gather(weight, indices.data(), indices.size(), dst, serial(), &bad);
            return;
          }
          for (size_t i = 0; i < indices.size() * stored.k; ++i) {
            const int64_t index = indices[i / stored.k];
            const size_t row = static_cast<size_t>(index < 0 ? index + 37 : index);
            const unsigned code = stored.codes[row * stored.k + i % stored.k];
            dst[i] = static_cast<float>(stored.format.integer(code)) * stored.scales[row];
          }
        }));
  }
}

}  // namespace

uint64_t compare_drivers(Comparison* comparison) {
  Checksum checksum;
  compare_matmul(comparison, &checksum);
  compare_conv(comparison, &checksum);
  compare_byte_conv(comparison, &checksum);
  compare_gather(comparison, &checksum);
  return checksum.value();
}

}  // namespace afpq::tests
