// Scale search and encoding for `afpq.rounding`, on NumPy arrays.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings/bindings.h"
#include "core/compensate.h"
#include "core/scale_search.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
nb::ndarray<nb::numpy, T> take(T* data, std::initializer_list<size_t> shape) {
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T>(data, shape, owner);
}

afpq::Format format_of(const std::string& text) {
  afpq::Format format;
  if (!afpq::parse_format(text.c_str(), &format)) {
    throw std::invalid_argument("no such format: " + text);
  }
  return format;
}

afpq::ScaleKind kind_of(const std::string& text) {
  if (text == "real") return afpq::ScaleKind::kReal;
  if (text == "integer") return afpq::ScaleKind::kInteger;
  throw std::invalid_argument("exponent bias kind '" + text + "' is not one of real, integer");
}

afpq::WeightView view_of(const Matrix& weight, const std::optional<Matrix>& energy) {
  const size_t n = weight.shape(0), k = weight.shape(1);
  if (!energy) return {weight.data(), n, k, nullptr, 1};
  const size_t rows = energy->shape(0);
  if (energy->shape(1) != k || rows == 0 || n % rows != 0) {
    throw std::invalid_argument("energy [" + std::to_string(rows) + ", " +
                                std::to_string(energy->shape(1)) + "] does not fit weight [" +
                                std::to_string(n) + ", " + std::to_string(k) + "]");
  }
  return {weight.data(), n, k, energy->data(), rows};
}

void check_scales(const Vector& scales, size_t n) {
  if (scales.shape(0) != n && scales.shape(0) != 1) {
    throw std::invalid_argument("got " + std::to_string(scales.shape(0)) + " scales for " +
                                std::to_string(n) + " rows");
  }
}

nb::tuple search_scales(const Matrix& weight, const std::optional<Matrix>& energy,
                        const std::string& format, const std::string& kind, size_t num_threads) {
  const afpq::WeightView view = view_of(weight, energy);
  const afpq::Format parsed = format_of(format);
  const afpq::ScaleKind parsed_kind = kind_of(kind);
  auto scales = take(new float[view.n], {view.n});
  auto errors = take(new double[view.n], {view.n});
  {
    nb::gil_scoped_release release;
    afpq::search_scales(view, parsed, parsed_kind, num_threads, scales.data(), errors.data());
  }
  return nb::make_tuple(scales, errors);
}

nb::ndarray<nb::numpy, double> scale_errors(const Matrix& weight,
                                            const std::optional<Matrix>& energy,
                                            const std::string& format, const Vector& scales,
                                            size_t num_threads) {
  const afpq::WeightView view = view_of(weight, energy);
  const afpq::Format parsed = format_of(format);
  check_scales(scales, view.n);
  auto errors = take(new double[view.n], {view.n});
  {
    nb::gil_scoped_release release;
    afpq::scale_errors(view, parsed, scales.data(), scales.shape(0), num_threads, errors.data());
  }
  return errors;
}

nb::ndarray<nb::numpy, uint8_t> encode_rows(const Matrix& values, const std::string& format,
                                            const Vector& scales, size_t num_threads) {
  const size_t n = values.shape(0), k = values.shape(1);
  const afpq::Format parsed = format_of(format);
  check_scales(scales, n);
  auto codes = take(new uint8_t[n * k], {n, k});
  {
    nb::gil_scoped_release release;
    afpq::encode_rows(values.data(), n, k, parsed, scales.data(), scales.shape(0), num_threads,
                      codes.data());
  }
  return codes;
}

nb::tuple round_compensated(const Matrix& target, const Matrix& second, const Matrix& feedback,
                            const std::string& format, const std::string& kind,
                            const Vector& scales, int num_refits, size_t num_threads) {
  const size_t n = target.shape(0), k = target.shape(1);
  const afpq::Format parsed = format_of(format);
  const afpq::ScaleKind parsed_kind = kind_of(kind);
  for (const Matrix* matrix : {&second, &feedback}) {
    if (matrix->shape(0) != k || matrix->shape(1) != k) {
      throw std::invalid_argument("moments [" + std::to_string(matrix->shape(0)) + ", " +
                                  std::to_string(matrix->shape(1)) +
                                  "] do not fit k = " + std::to_string(k));
    }
  }
  if (scales.shape(0) != n) {
    throw std::invalid_argument("got " + std::to_string(scales.shape(0)) + " scales for " +
                                std::to_string(n) + " rows");
  }
  auto final_scales = take(new float[n], {n});
  auto values = take(new float[n * k], {n, k});
  auto errors = take(new double[n], {n});
  std::copy(scales.data(), scales.data() + n, final_scales.data());
  {
    nb::gil_scoped_release release;
    afpq::round_compensated(target.data(), n, {second.data(), feedback.data(), k}, parsed,
                            parsed_kind, num_refits, num_threads, final_scales.data(),
                            values.data(), errors.data());
  }
  return nb::make_tuple(values, final_scales, errors);
}

}  // namespace

void bind_rounding(nb::module_& module) {
  module.def("search_scales", &search_scales, "weight"_a, "energy"_a.none(), "format"_a, "kind"_a,
             "num_threads"_a = 1,
             "The best storable scale of every row and its error: (float32 [n], float64 [n]).");
  module.def("scale_errors", &scale_errors, "weight"_a, "energy"_a.none(), "format"_a, "scales"_a,
             "num_threads"_a = 1,
             "Weighted squared error of every row with given scales ([n] or [1]): float64 [n].");
  module.def("encode_rows", &encode_rows, "values"_a, "format"_a, "scales"_a, "num_threads"_a = 1,
             "Codes of the nearest values, as `formats.encode` finds them: uint8 [n, k].");
  module.def("round_compensated", &round_compensated, "target"_a, "second"_a, "feedback"_a,
             "format"_a, "kind"_a, "scales"_a, "num_refits"_a, "num_threads"_a = 1,
             "Values [n, k], scales [n] and expected squared errors [n] of rounding that keeps the "
             "products; see core/compensate.h.");
}
