// What the bindings of kernels share: arrays of the caller, checks and arguments.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "drivers/gemm.h"
#include "kernels/dispatch.h"

namespace nb = nanobind;

template <typename T, int kAxes>
using Array = nb::ndarray<T, nb::ndim<kAxes>, nb::c_contig, nb::device::cpu>;

inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

inline const AfpqKernels& table_of(const std::string& isa) {
  const char* error = "";
  const AfpqKernels* kernels = afpq::select_kernels(isa.c_str(), &error);
  if (kernels == nullptr) throw std::invalid_argument(error);
  return *kernels;
}

// Fixed point, or the static format of a scale > 0.
inline AfpqQuantize quantizer(float inverse_scale, int32_t zero_point, const std::string& format,
                              float scale, uint8_t* planes, size_t num_planes, size_t size) {
  require(num_planes == 1 || num_planes == 2, "dst must have 1 or 2 planes");
  AfpqQuantize q = {};
  if (scale > 0) {
    require(num_planes == 1, "a format needs dst with 1 plane");
    afpq::LhsRounding rounding;
    rounding.mode = afpq::Activations::kA8;
    rounding.scale = scale;
    require(afpq::parse_format(format.c_str(), &rounding.format) &&
                afpq::fits_activations(rounding.format),
            "no such format of activations");
    q = afpq::static_quantizer(rounding).quantize;
  } else {
    q.inverse_scale = inverse_scale;
    q.zero_point = zero_point;
    q.num_planes = static_cast<int>(num_planes);
  }
  q.planes[0] = planes;
  q.planes[1] = planes + size;
  return q;
}

// The quantizer of `levels` 256 or 65536, or of a format, writing words.
inline AfpqQuantize word_quantizer(float inverse_scale, int32_t zero_point,
                                   const std::string& format, float scale, int levels,
                                   int16_t* words) {
  require(levels == 256 || levels == 65536, "levels must be 256 or 65536");
  AfpqQuantize q =
      quantizer(inverse_scale, zero_point, format, scale, nullptr, levels == 256 ? 1 : 2, 0);
  q.words = words;
  return q;
}
