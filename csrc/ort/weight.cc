#include "ort/weight.h"

#include <cmath>
#include <cstring>
#include <sstream>

#include "core/huge_pages.h"
#include "kernels/dispatch.h"

namespace afpq::ort {
namespace {

std::vector<float> read_scales(const Tensor& tensor, const Format& format) {
  std::vector<float> scales(tensor.size());
  for (size_t i = 0; i < scales.size(); ++i) {
    if (tensor.type == kInt8) {
      scales[i] = std::ldexp(1.0f, 1 - format.mantissa_bits - tensor.as<int8_t>()[i]);
    } else {
      const uint32_t bits = static_cast<uint32_t>(tensor.as<uint16_t>()[i]) << 16;
      std::memcpy(&scales[i], &bits, sizeof bits);
    }
  }
  return scales;
}

void check_scales(const Tensor& tensor, size_t n, size_t k, size_t group_size) {
  if (tensor.type != kInt8 && tensor.type != kBfloat16) {
    throw Error(kInvalidArgument,
                "scale must be bfloat16 or int8, got element type " + std::to_string(tensor.type));
  }
  if (group_size) {
    if (tensor.dims == std::vector<int64_t>{static_cast<int64_t>(ceil_div(k, group_size)),
                                            static_cast<int64_t>(n)}) {
      return;
    }
  } else if (tensor.dims.size() == 1 && (tensor.size() == 1 || tensor.size() == n)) {
    return;
  }
  throw Error(kInvalidArgument, "scale has shape " + to_string(tensor.dims) +
                                    ", which fits neither n = " + std::to_string(n) +
                                    " nor group_size = " + std::to_string(group_size));
}

}  // namespace

size_t positive(const KernelInfo& info, const char* name) {
  const int64_t value = info.integer(name);
  if (value <= 0 || value > (int64_t{1} << 40)) {
    throw Error(kInvalidArgument, std::string("attribute ") + name + " is " +
                                      std::to_string(value) + ", not positive");
  }
  return static_cast<size_t>(value);
}

LhsRounding read_activations(const KernelInfo& info) {
  LhsRounding rounding;
  const std::string mode = info.text("activations", "a16");
  if (mode != "a16" && mode != "a8" && mode != "f32") {
    throw Error(kInvalidArgument,
                "attribute activations is '" + mode + "', not one of a16, a8, f32");
  }
  rounding.mode = mode == "a16"  ? Activations::kA16
                  : mode == "a8" ? Activations::kA8
                                 : Activations::kF32;
  const LhsRounding read = read_static_format(info, "activation");
  if (read.scale == 0) return rounding;
  if (rounding.mode != Activations::kA8) {
    throw Error(kInvalidArgument,
                "attribute activation_format needs activations 'a8', not '" + mode + "'");
  }
  return read;
}

LhsRounding read_static_format(const KernelInfo& info, const std::string& name) {
  LhsRounding rounding;
  const std::string format_name = name + "_format", scale_name = name + "_scale";
  const std::string format = info.text(format_name.c_str(), "");
  const float scale = info.real(scale_name.c_str(), 0.0f);
  if (format.empty()) {
    if (scale == 0) return rounding;
    throw Error(kInvalidArgument, "attribute " + scale_name + " needs " + format_name);
  }
  if (!parse_format(format.c_str(), &rounding.format) || !fits_activations(rounding.format)) {
    throw Error(kInvalidArgument, "attribute " + format_name + " is '" + format +
                                      "', not a format with a mantissa whose integers fit a byte, "
                                      "such as ue2m5 or e0m7");
  }
  if (!is_short_scale(scale)) {
    std::ostringstream message;
    message << "attribute " << scale_name << " is " << scale
            << ", not a positive number of at most 8 significant bits";
    throw Error(kInvalidArgument, message.str());
  }
  rounding.mode = Activations::kA8;
  rounding.scale = scale;
  return rounding;
}

PackedWeight read_weight(const KernelInfo& info, size_t index, size_t segment_multiple,
                         bool integer_sums) {
  Format format;
  const std::string text = info.text("format");
  if (!parse_format(text.c_str(), &format)) {
    throw Error(kInvalidArgument,
                "attribute format is '" + text + "', not a format of 2 to 8 bits such as e2m2");
  }
  const size_t n = positive(info, "n"), k = positive(info, "k");
  const int64_t group_size = info.integer("group_size", 0);
  if (group_size < 0 || group_size % kTileK) {
    throw Error(kInvalidArgument, "attribute group_size is " + std::to_string(group_size) +
                                      ", not a multiple of " + std::to_string(kTileK));
  }
  const Tensor data = info.constant(index, "weight");
  const size_t bytes = packed_bytes(n, k, format.bits());
  if (data.type != kUint8 || data.dims.size() != 1 || data.size() != bytes) {
    throw Error(kInvalidArgument, "weight must be uint8 [" + std::to_string(bytes) + "] for n = " +
                                      std::to_string(n) + ", k = " + std::to_string(k) + ", " +
                                      text + ", got " + to_string(data.dims));
  }
  const Tensor scale = info.constant(index + 1, "scale");
  check_scales(scale, n, k, static_cast<size_t>(group_size));
  const std::vector<float> scales = read_scales(scale, format);
  for (const float s : scales) {
    if (!(s > 0) || !std::isfinite(s))
      throw Error(kInvalidArgument, "scale holds a value that is not positive and finite");
  }
  use_huge_pages(data.data, bytes);
  PackedWeight weight;
  load_weight(kernels(), format, data.as<uint8_t>(), n, k, scales.data(), scales.size(),
              static_cast<size_t>(group_size), segment_multiple, integer_sums, &weight);
  return weight;
}

Bias::Bias(const KernelInfo& info, size_t index, size_t n) : index_(index), n_(n) {
  Tensor bias;
  if (info.get_constant(index, "bias", &bias)) constant_ = check(bias);
}

const float* Bias::read(const KernelContext& context) const {
  if (constant_ || context.num_inputs() <= index_) return constant_;
  const Tensor bias = context.input(index_);
  return bias.data ? check(bias) : nullptr;
}

const float* Bias::check(const Tensor& bias) const {
  if (bias.type != kFloat || bias.size() != n_) {
    throw Error(kInvalidArgument,
                "bias must be float32 [" + std::to_string(n_) + "], got " + to_string(bias.dims));
  }
  return bias.as<float>();
}

Tensor float_input(const KernelContext& context, size_t index, const char* name) {
  const Tensor tensor = context.input(index);
  if (tensor.type != kFloat)
    throw Error(kInvalidArgument, std::string("input ") + name + " must be float32");
  return tensor;
}

void check_residual(const Tensor& residual, const std::vector<int64_t>& dims) {
  if (residual.dims != dims) {
    throw Error(kInvalidArgument,
                "residual has shape " + to_string(residual.dims) + ", needs " + to_string(dims));
  }
}

const AfpqKernels& kernels() {
  const char* error = nullptr;
  const AfpqKernels* table = active_kernels(&error);
  if (table == nullptr) throw Error(kInvalidArgument, error);
  return *table;
}

}  // namespace afpq::ort
