// Drivers as functions of NumPy arrays, on any ISA and number of threads: what the tests compare
// with NumPy.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>
#include <thread>

#include "bindings/bindings.h"
#include "drivers/conv.h"
#include "drivers/gather.h"
#include "drivers/matmul.h"
#include "kernels/dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, float>;

const AfpqKernels& table(const std::string& isa) {
  const char* error = nullptr;
  const AfpqKernels* kernels = afpq::select_kernels(isa.c_str(), &error);
  if (kernels == nullptr) throw std::invalid_argument(error);
  return *kernels;
}

// Runs tasks on `count` threads made for the call: slow to start, which a test does not mind.
struct Threads {
  size_t count;
  static void run(void* self, size_t total, void (*task)(void*, size_t), void* user) {
    std::atomic<size_t> next{0};
    const auto work = [&] {
      for (size_t i; (i = next++) < total;) task(user, i);
    };
    std::vector<std::thread> threads;
    for (size_t t = 1; t < static_cast<Threads*>(self)->count; ++t) threads.emplace_back(work);
    work();
    for (std::thread& thread : threads) thread.join();
  }
};

Result make_result(std::vector<size_t> shape) {
  size_t size = 1;
  for (const size_t extent : shape) size *= extent;
  float* data = new float[size];
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return Result(data, shape.size(), shape.data(), owner);
}

afpq::PackedWeight weight_of(const AfpqKernels& kernels, const std::string& format,
                             const Bytes& data, size_t n, size_t k, const Floats& scales,
                             size_t group_size, size_t multiple, bool sums) {
  afpq::Format parsed;
  if (!afpq::parse_format(format.c_str(), &parsed))
    throw std::invalid_argument("no such format: " + format);
  if (data.size() != afpq::packed_bytes(n, k, parsed.bits())) {
    throw std::invalid_argument("data has " + std::to_string(data.size()) +
                                " bytes, which do not fit n, k and format");
  }
  const size_t groups = group_size ? afpq::ceil_div(k, group_size) : 1;
  if (scales.size() != 1 && scales.size() != groups * n)
    throw std::invalid_argument("scales do not fit n");
  if (group_size % kTileK) throw std::invalid_argument("group_size must be a multiple of 4");
  afpq::PackedWeight weight;
  load_weight(kernels, parsed, data.data(), n, k, scales.data(), scales.size(), group_size,
              multiple, sums, &weight);
  return weight;
}

// "a16", "a8", "f32", or a8 with the format of a scale > 0.
afpq::LhsRounding rounding_of(const std::string& mode, const std::string& format, float scale) {
  afpq::LhsRounding rounding;
  if (mode != "a16" && mode != "a8" && mode != "f32")
    throw std::invalid_argument("activations must be a16, a8 or f32, got " + mode);
  if (mode == "a8") rounding.mode = afpq::Activations::kA8;
  if (mode == "f32") rounding.mode = afpq::Activations::kF32;
  if (scale == 0) return rounding;
  if (mode != "a8")
    throw std::invalid_argument("a format of activations goes with a8, got " + mode);
  if (!afpq::parse_format(format.c_str(), &rounding.format) ||
      !afpq::fits_activations(rounding.format))
    throw std::invalid_argument("no format of activations: " + format);
  if (!afpq::is_short_scale(scale))
    throw std::invalid_argument("no scale of activations: " + std::to_string(scale));
  rounding.scale = scale;
  return rounding;
}

const float* bias_of(const std::optional<Floats>& bias, size_t n) {
  if (bias && bias->size() != n) throw std::invalid_argument("bias does not have n elements");
  return bias ? bias->data() : nullptr;
}

Result run_matmul(const std::string& isa, size_t threads, Floats lhs, Bytes data,
                  const std::string& format, size_t n, size_t k, Floats scales, size_t group_size,
                  std::optional<Floats> bias, const std::string& activations, float low, float high,
                  const std::string& activation_format, float activation_scale) {
  if (lhs.ndim() != 2 || lhs.shape(1) != k) throw std::invalid_argument("lhs must be [m, k]");
  const AfpqKernels& kernels = table(isa);
  const afpq::LhsRounding rounding = rounding_of(activations, activation_format, activation_scale);
  const afpq::PackedWeight weight = weight_of(kernels, format, data, n, k, scales, group_size, 1,
                                              rounding.mode != afpq::Activations::kF32);
  Result result = make_result({lhs.shape(0), n});
  Threads pool{threads};
  const afpq::Matmul op{&kernels, &weight, rounding, bias_of(bias, n), low, high};
  matmul(op, lhs.data(), lhs.shape(0), result.data(), {Threads::run, &pool});
  return result;
}

// Three spatial axes everywhere; `out` is the output's extent.
Result run_conv(const std::string& isa, size_t threads, Floats x, Bytes data,
                const std::string& format, size_t n, size_t k, Floats scales,
                std::optional<Floats> bias, const std::string& activations, float low, float high,
                size_t groups, std::vector<size_t> kernel, std::vector<size_t> strides,
                std::vector<size_t> dilations, std::vector<size_t> pads, std::vector<size_t> out,
                const std::string& activation_format, float activation_scale) {
  if (x.ndim() != 5)
    throw std::invalid_argument("x must be [batch, channels, depth, height, width]");
  afpq::ConvShape shape;
  shape.channels_in = x.shape(1);
  shape.channels_out = n;
  shape.groups = groups;
  for (size_t axis = 0; axis < 3; ++axis) {
    shape.in[axis] = x.shape(2 + axis);
    shape.out[axis] = out.at(axis);
    shape.kernel[axis] = kernel.at(axis);
    shape.strides[axis] = strides.at(axis);
    shape.dilations[axis] = dilations.at(axis);
    shape.pads[axis] = pads.at(axis);
  }
  if (k != shape.num_taps() * shape.group_in())
    throw std::invalid_argument("k is not taps * channels per group");
  const AfpqKernels& kernels = table(isa);
  const afpq::LhsRounding rounding = rounding_of(activations, activation_format, activation_scale);
  const size_t multiple = shape.group_in() % kTileK == 0 ? shape.group_in() / kTileK : 1;
  const bool sums = rounding.mode != afpq::Activations::kF32 && !conv_is_planar(shape);
  const afpq::PackedWeight weight =
      weight_of(kernels, format, data, n, k, scales, 0, multiple, sums);
  Result result = make_result({x.shape(0), n, out[0], out[1], out[2]});
  Threads pool{threads};
  const afpq::Conv op{&kernels, &weight, rounding, bias_of(bias, n), low, high};
  conv(op, shape, x.data(), x.shape(0), result.data(), {Threads::run, &pool});
  return result;
}

Result run_unpack(Bytes data, const std::string& format, size_t n, size_t k, Floats scales,
                  size_t group_size) {
  const AfpqKernels& kernels = table("scalar");
  const afpq::PackedWeight weight =
      weight_of(kernels, format, data, n, k, scales, group_size, 1, false);
  Result result = make_result({n, k});
  Threads pool{1};
  unpack(weight, result.data(), {Threads::run, &pool});
  return result;
}

bool is_planar(size_t channels_in, size_t channels_out, size_t groups, size_t num_taps) {
  afpq::ConvShape shape;
  shape.channels_in = channels_in;
  shape.channels_out = channels_out;
  shape.groups = groups;
  shape.kernel[0] = num_taps;
  return afpq::conv_is_planar(shape);
}

}  // namespace

void bind_drivers(nb::module_& module) {
  module.def("matmul", &run_matmul, "isa"_a, "threads"_a, "lhs"_a, "data"_a, "format"_a, "n"_a,
             "k"_a, "scales"_a, "group_size"_a, "bias"_a.none(), "activations"_a, "low"_a, "high"_a,
             "activation_format"_a = "", "activation_scale"_a = 0.0f);
  module.def("conv", &run_conv, "isa"_a, "threads"_a, "x"_a, "data"_a, "format"_a, "n"_a, "k"_a,
             "scales"_a, "bias"_a.none(), "activations"_a, "low"_a, "high"_a, "groups"_a,
             "kernel"_a, "strides"_a, "dilations"_a, "pads"_a, "out"_a, "activation_format"_a = "",
             "activation_scale"_a = 0.0f);
  module.def("conv_is_planar", &is_planar, "channels_in"_a, "channels_out"_a, "groups"_a,
             "num_taps"_a);
  module.def("unpack", &run_unpack, "data"_a, "format"_a, "n"_a, "k"_a, "scales"_a, "group_size"_a);
}
