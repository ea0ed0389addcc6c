// What all ops share: reading format, weight, scales and bias of a node, with errors that name the
// attribute.
#pragma once

#include <string>
#include <vector>

#include "drivers/gemm.h"
#include "ort/api.h"

namespace afpq::ort {

// One of the allowed sizes; throws naming the attribute otherwise.
size_t positive(const KernelInfo& info, const char* name);

// Reads attributes activations, activation_format and activation_scale.
LhsRounding read_activations(const KernelInfo& info);

// Reads attributes NAME_format and NAME_scale, a static format; `name` has none (scale 0) where
// both are missing.
LhsRounding read_static_format(const KernelInfo& info, const std::string& name);

// Reads attributes format, n, k and the two constant inputs: the packed bytes at `index`, the
// scales at `index + 1`. Segments end at multiples of segment_multiple tiles. The bytes stay where
// the runtime keeps them.
PackedWeight read_weight(const KernelInfo& info, size_t index, size_t segment_multiple,
                         bool integer_sums);

// The optional bias, constant or computed: [n] floats or null. A constant is looked at once.
class Bias {
 public:
  Bias(const KernelInfo& info, size_t index, size_t n);
  const float* read(const KernelContext& context) const;

 private:
  const float* check(const Tensor& bias) const;

  size_t index_, n_;
  const float* constant_ = nullptr;
};

// Input `index` as float32; throws when it has another type.
Tensor float_input(const KernelContext& context, size_t index, const char* name);

// Throws unless a residual lies like what it is added to.
void check_residual(const Tensor& residual, const std::vector<int64_t>& dims);

const AfpqKernels& kernels();

}  // namespace afpq::ort
