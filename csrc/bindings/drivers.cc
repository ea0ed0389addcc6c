// Drivers as functions of NumPy arrays, on any ISA and number of threads: what the tests compare
// with NumPy, and what `afpq.torch` calls. Nothing is copied but the scales: results go into `out`
// if there is one, and column sums that were made once (`column_sums`) need not be made again.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "bindings/bindings.h"
#include "bindings/threads.h"
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
using Sums = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

const AfpqKernels& table(const std::string& isa) {
  const char* error = nullptr;
  const AfpqKernels* kernels = afpq::select_kernels(isa.c_str(), &error);
  if (kernels == nullptr) throw std::invalid_argument(error);
  return *kernels;
}

// Where a driver writes: into the caller's array, or into a new one, which is returned.
struct Destination {
  float* data;
  std::optional<Result> made;
};

Destination destination(const std::vector<size_t>& shape, const std::optional<Out>& out) {
  size_t size = 1;
  for (const size_t extent : shape) size *= extent;
  if (out) {
    if (out->size() != size) throw std::invalid_argument("out does not fit the result");
    return {out->data(), std::nullopt};
  }
  float* data = new float[size];
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return {data, Result(data, shape.size(), shape.data(), owner)};
}

afpq::PackedWeight weight_of(const AfpqKernels& kernels, const std::string& format,
                             const Bytes& data, size_t n, size_t k, const Floats& scales,
                             size_t group_size, size_t multiple, bool needs_sums,
                             const std::optional<Sums>& sums = {}) {
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
              multiple, needs_sums && !sums, &weight);
  if (!needs_sums || !sums) return weight;
  const size_t width = weight.segments.size() * weight.num_blocks * kTileN;
  const size_t planes = static_cast<size_t>(parsed.num_planes());
  if (sums->shape(0) != planes || sums->shape(1) != width + 2)
    throw std::invalid_argument("sums do not fit the weight");
  for (size_t plane = 0; plane < planes; ++plane) {
    const int32_t* row = sums->data() + plane * (width + 2);
    weight.column_sums[plane].assign(row, row + width);
    weight.sides[plane] = row[width];
    weight.joined_side = row[width + 1];
  }
  use_sums(kernels, &weight);
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

std::optional<Result> run_matmul(const std::string& isa, size_t threads, Floats lhs, Bytes data,
                                 const std::string& format, size_t n, size_t k, Floats scales,
                                 size_t group_size, std::optional<Floats> bias,
                                 const std::string& activations, float low, float high,
                                 const std::string& activation_format, float activation_scale,
                                 std::optional<Sums> sums, std::optional<Out> out,
                                 std::optional<Floats> residual) {
  if (lhs.ndim() != 2 || lhs.shape(1) != k) throw std::invalid_argument("lhs must be [m, k]");
  const AfpqKernels& kernels = table(isa);
  const afpq::LhsRounding rounding = rounding_of(activations, activation_format, activation_scale);
  const afpq::PackedWeight weight = weight_of(kernels, format, data, n, k, scales, group_size, 1,
                                              rounding.mode != afpq::Activations::kF32, sums);
  Destination result = destination({lhs.shape(0), n}, out);
  afpq::Threads pool(threads);
  const afpq::Matmul op{&kernels, &weight, rounding, bias_of(bias, n), low, high};
  const float* data_in = lhs.data();
  const size_t m = lhs.shape(0);
  if (residual && residual->size() != m * n)
    throw std::invalid_argument("residual does not fit the result");
  const float* added = residual ? residual->data() : nullptr;
  {
    nb::gil_scoped_release release;
    matmul(op, data_in, m, added, result.data, pool.parallel());
  }
  return std::move(result.made);
}

// Three spatial axes everywhere; `extent` is the output's.
std::optional<Result> run_conv(const std::string& isa, size_t threads, Floats x, Bytes data,
                               const std::string& format, size_t n, size_t k, Floats scales,
                               std::optional<Floats> bias, const std::string& activations,
                               float low, float high, size_t groups, std::vector<size_t> kernel,
                               std::vector<size_t> strides, std::vector<size_t> dilations,
                               std::vector<size_t> pads, std::vector<size_t> extent,
                               const std::string& activation_format, float activation_scale,
                               std::optional<Sums> sums, std::optional<Out> out,
                               std::optional<Floats> residual) {
  if (x.ndim() != 5)
    throw std::invalid_argument("x must be [batch, channels, depth, height, width]");
  afpq::ConvShape shape;
  shape.channels_in = x.shape(1);
  shape.channels_out = n;
  shape.groups = groups;
  for (size_t axis = 0; axis < 3; ++axis) {
    shape.in[axis] = x.shape(2 + axis);
    shape.out[axis] = extent.at(axis);
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
  const bool planar = conv_is_planar(shape, rounding.scale > 0);
  const bool needs_sums = rounding.mode != afpq::Activations::kF32 && !planar;
  const afpq::PackedWeight weight =
      weight_of(kernels, format, data, n, k, scales, 0, multiple, needs_sums, sums);
  Destination result = destination({x.shape(0), n, extent[0], extent[1], extent[2]}, out);
  if (residual && residual->size() != x.shape(0) * n * shape.num_out())
    throw std::invalid_argument("residual does not fit the result");
  afpq::Threads pool(threads);
  const afpq::Conv op{&kernels, &weight, rounding, bias_of(bias, n), low, high, {}, {}};
  const afpq::ConvSource source{x.data(), nullptr};
  const afpq::ConvTarget target{result.data, nullptr, nullptr,
                                residual ? residual->data() : nullptr};
  const size_t batch = x.shape(0);
  {
    nb::gil_scoped_release release;
    conv(op, shape, source, batch, target, pool.parallel());
  }
  return std::move(result.made);
}

void run_gather(size_t threads, Indices indices, Bytes data, const std::string& format, size_t n,
                size_t k, Floats scales, Out out) {
  const AfpqKernels& kernels = table("scalar");
  const afpq::PackedWeight weight = weight_of(kernels, format, data, n, k, scales, 0, 1, false);
  if (out.size() != indices.size() * k) throw std::invalid_argument("out does not fit the result");
  afpq::Threads pool(threads);
  int64_t bad = 0;
  if (!gather(weight, indices.data(), indices.size(), out.data(), pool.parallel(), &bad)) {
    throw std::out_of_range("index " + std::to_string(bad) + " is not in the range " +
                            std::to_string(-static_cast<int64_t>(n)) + ".." +
                            std::to_string(n - 1));
  }
}

std::optional<Result> run_unpack(Bytes data, const std::string& format, size_t n, size_t k,
                                 Floats scales, size_t group_size, std::optional<Out> out) {
  const AfpqKernels& kernels = table("scalar");
  const afpq::PackedWeight weight =
      weight_of(kernels, format, data, n, k, scales, group_size, 1, false);
  Destination result = destination({n, k}, out);
  afpq::Threads pool(1);
  unpack(weight, result.data, pool.parallel());
  return std::move(result.made);
}

// [planes, segments * padded n + 2]: what zero points are multiplied by, and last the largest sums
// of numbers of one sign: of the plane, and of a pair. `multiple` is the number of tiles of a
// convolution's tap where those are whole, else 1.
nb::ndarray<nb::numpy, int32_t> run_column_sums(const std::string& isa, Bytes data,
                                                const std::string& format, size_t n, size_t k,
                                                size_t group_size, size_t multiple) {
  const std::vector<float> ones(1, 1.0f);
  const size_t one[] = {1};
  const afpq::PackedWeight weight = weight_of(
      table(isa), format, data, n, k, Floats(ones.data(), 1, one), group_size, multiple, true);
  const size_t planes = static_cast<size_t>(weight.format.num_planes());
  const size_t width = weight.segments.size() * weight.num_blocks * kTileN;
  int32_t* sums = new int32_t[planes * (width + 2)];
  nb::capsule owner(sums, [](void* p) noexcept { delete[] static_cast<int32_t*>(p); });
  for (size_t plane = 0; plane < planes; ++plane) {
    int32_t* row = sums + plane * (width + 2);
    std::copy(weight.column_sums[plane].begin(), weight.column_sums[plane].end(), row);
    row[width] = weight.sides[plane];
    row[width + 1] = weight.joined_side;
  }
  const size_t shape[] = {planes, width + 2};
  return {sums, 2, shape, owner};
}

bool is_planar(size_t channels_in, size_t channels_out, size_t groups, size_t num_taps,
               bool is_static) {
  afpq::ConvShape shape;
  shape.channels_in = channels_in;
  shape.channels_out = channels_out;
  shape.groups = groups;
  shape.kernel[0] = num_taps;
  return conv_is_planar(shape, is_static);
}

}  // namespace

void bind_drivers(nb::module_& module) {
  module.def("matmul", &run_matmul, "isa"_a, "threads"_a, "lhs"_a, "data"_a, "format"_a, "n"_a,
             "k"_a, "scales"_a, "group_size"_a, "bias"_a.none(), "activations"_a, "low"_a, "high"_a,
             "activation_format"_a = "", "activation_scale"_a = 0.0f, "sums"_a = nb::none(),
             "out"_a = nb::none(), "residual"_a = nb::none());
  module.def("conv", &run_conv, "isa"_a, "threads"_a, "x"_a, "data"_a, "format"_a, "n"_a, "k"_a,
             "scales"_a, "bias"_a.none(), "activations"_a, "low"_a, "high"_a, "groups"_a,
             "kernel"_a, "strides"_a, "dilations"_a, "pads"_a, "extent"_a,
             "activation_format"_a = "", "activation_scale"_a = 0.0f, "sums"_a = nb::none(),
             "out"_a = nb::none(), "residual"_a = nb::none());
  module.def("conv_is_planar", &is_planar, "channels_in"_a, "channels_out"_a, "groups"_a,
             "num_taps"_a, "is_static"_a);
  module.def("gather", &run_gather, "threads"_a, "indices"_a, "data"_a, "format"_a, "n"_a, "k"_a,
             "scales"_a, "out"_a);
  module.def("unpack", &run_unpack, "data"_a, "format"_a, "n"_a, "k"_a, "scales"_a, "group_size"_a,
             "out"_a = nb::none());
  module.def("column_sums", &run_column_sums, "isa"_a, "data"_a, "format"_a, "n"_a, "k"_a,
             "group_size"_a, "multiple"_a);
}
