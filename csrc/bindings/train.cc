// Rounding to small floats and products with rounded sums, for `afpq.train`.
#include "train/train.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "bindings/bindings.h"
#include "bindings/threads.h"
#include "core/float_bits.h"
#include "kernels/dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Values = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutValues = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutMatrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// low_limit, max, overflow, step; dropped bits, tie flip: afpq/floats.py makes them.
using FormatNumbers = std::tuple<float, float, float, float, int, int>;

AfpqFloatFormat format_of(const FormatNumbers& numbers) {
  const auto [low_limit, max, overflow, step, dropped_bits, tie_flip] = numbers;
  if (dropped_bits < 13 || dropped_bits > 23)
    throw std::invalid_argument("dropped bits not 13..23");
  const auto bits = [](float value) { return static_cast<int32_t>(afpq::bits_of(value)); };
  return {bits(low_limit), bits(max), bits(overflow), dropped_bits, tie_flip & 1, step};
}

afpq::Seed seed_of(std::optional<uint64_t> seed) { return {seed.has_value(), seed.value_or(0)}; }

const AfpqTrainKernels& kernels_of(const std::string& isa) {
  const char* error = nullptr;
  const AfpqKernels* kernels = afpq::select_kernels(isa.c_str(), &error);
  if (kernels == nullptr) throw std::invalid_argument(error);
  return afpq::train_kernels(kernels->isa);
}

// src and dst: [size], the same ones or apart
void round_values(const std::string& isa, size_t threads, const FormatNumbers& numbers,
                  std::optional<uint64_t> seed, const Values& src, const OutValues& dst) {
  if (src.size() != dst.size()) throw std::invalid_argument("src and dst differ in size");
  const AfpqTrainKernels& kernels = kernels_of(isa);
  const AfpqFloatFormat format = format_of(numbers);
  nb::gil_scoped_release release;
  afpq::Threads pool(threads);
  afpq::round_values(kernels, pool.parallel(), format, seed_of(seed), src.data(), dst.data(),
                     src.size());
}

void multiply_rounded(const std::string& isa, size_t threads, const FormatNumbers& numbers,
                      std::optional<uint64_t> seed, size_t chunk, const Matrix& lhs,
                      const Matrix& rhs, const OutMatrix& dst) {
  const size_t m = lhs.shape(0), k = lhs.shape(1), n = rhs.shape(1);
  if (rhs.shape(0) != k || dst.shape(0) != m || dst.shape(1) != n) {
    throw std::invalid_argument("lhs must be [m, k], rhs [k, n] and dst [m, n]");
  }
  if (chunk == 0) throw std::invalid_argument("a chunk has at least one product");
  const AfpqTrainKernels& kernels = kernels_of(isa);
  const AfpqFloatFormat format = format_of(numbers);
  nb::gil_scoped_release release;
  afpq::Threads pool(threads);
  afpq::multiply_rounded(kernels, pool.parallel(), format, seed_of(seed), chunk, lhs.data(),
                         rhs.data(), m, n, k, dst.data());
}

}  // namespace

void bind_train(nb::module_& module) {
  module.def("round_values", round_values, "isa"_a, "threads"_a, "format"_a, "seed"_a.none(),
             "src"_a, "dst"_a);
  module.def("multiply_rounded", multiply_rounded, "isa"_a, "threads"_a, "format"_a,
             "seed"_a.none(), "chunk"_a, "lhs"_a, "rhs"_a, "dst"_a);
}
