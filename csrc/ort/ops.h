// The ops of the domain `afpq`, version 1. The specification is docs/specification.md.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "drivers/conv.h"
#include "drivers/matmul.h"
#include "ort/weight.h"

namespace afpq::ort {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Y[..., n] = clamp(X[..., k] * weight^T + bias)
class MatMulOp {
 public:
  static constexpr const char* kName = "MatMul";
  static constexpr size_t kNumInputs = 4, kNumRequired = 3;
  static int input_type(size_t index);
  explicit MatMulOp(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  LhsRounding rounding_;
  PackedWeight weight_;
  float low_, high_;
};

// Y = clamp(convolution of X with the weight, plus bias)
class ConvOp {
 public:
  static constexpr const char* kName = "Conv";
  static constexpr size_t kNumInputs = 4, kNumRequired = 3;
  static int input_type(size_t index);
  explicit ConvOp(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  void read_axes(const KernelInfo& info);
  ConvShape shape_of(const std::vector<int64_t>& dims) const;

  size_t rank_ = 0;  // spatial axes
  ConvShape base_;   // everything but the sizes that come with X
  size_t end_pads_[3] = {0, 0, 0};
  std::string auto_pad_;
  LhsRounding rounding_;
  PackedWeight weight_;
  float low_, high_;
};

// Y = rows of the table at the indices
class GatherOp {
 public:
  static constexpr const char* kName = "Gather";
  static constexpr size_t kNumInputs = 3, kNumRequired = 3;
  static int input_type(size_t index);
  explicit GatherOp(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  PackedWeight weight_;
};

// Y = the tensor as float32, for consumers that have no kernel
class UnpackOp {
 public:
  static constexpr const char* kName = "Unpack";
  static constexpr size_t kNumInputs = 2, kNumRequired = 2;
  static int input_type(size_t index);
  explicit UnpackOp(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  PackedWeight weight_;
  std::vector<int64_t> dims_;
};

}  // namespace afpq::ort
