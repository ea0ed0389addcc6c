// The ops of the domain `afpq`, version 1. The specification is docs/specification.md.
#pragma once

#include <string>
#include <vector>

#include "drivers/conv.h"
#include "drivers/matmul.h"
#include "ort/weight.h"

namespace afpq::ort {

// Y[..., n] = clamp(X[..., k] * weight^T + bias + residual)
class MatMulOp {
 public:
  static constexpr const char* kName = "MatMul";
  static constexpr size_t kNumInputs = 5, kNumRequired = 3;
  static constexpr int kOutputType = kFloat;
  static int input_type(size_t index);
  explicit MatMulOp(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  LhsRounding rounding_;
  PackedWeight weight_;
  Bias bias_;
  float low_, high_;
};

// Where a window lies, as attributes say: kernel_shape, strides, pads, dilations, auto_pad.
class Geometry {
 public:
  explicit Geometry(const KernelInfo& info);

  size_t rank() const { return rank_; }  // spatial axes
  const ConvShape& base() const { return base_; }
  // Throws unless every window reaches into an input of any size: no pad is as wide as the kernel.
  void check_pads() const;
  // The shape with the extents of an input that begin at dims[first]; `ceil`: windows may stick out
  // at the end.
  ConvShape shape_of(const std::vector<int64_t>& dims, size_t first, bool ceil) const;

 private:
  size_t rank_ = 0;
  ConvShape base_;
  size_t end_pads_[3] = {0, 0, 0};
  std::string auto_pad_;
};

// Y = clamp(convolution of X with the weight, plus bias, plus residual). X: float32 [N, C, ...], or
// uint8 [N, ..., C] of the static format; residual: float32 like Y, or uint8 [N, ..., n]; Y:
// float32 [N, n, ...].
class ConvOp {
 public:
  static constexpr const char* kName = "Conv";
  static constexpr size_t kNumInputs = 5, kNumRequired = 3;
  static constexpr int kOutputType = kFloat;
  static int input_type(size_t index);
  explicit ConvOp(const KernelInfo& info);
  void compute(KernelContext& context) const { run(context, false); }

 protected:
  void run(KernelContext& context, bool to_bytes) const;
  LhsRounding dst_rounding_;

 private:
  ConvShape shape_of(const Tensor& x) const;
  // dst knows already where results go.
  void read_residual(const KernelContext& context, const ConvShape& shape, int64_t batch,
                     ConvTarget* dst) const;

  Geometry geometry_;
  ConvShape base_;  // everything but the sizes that come with X
  LhsRounding rounding_, residual_rounding_;
  PackedWeight weight_;
  Bias bias_;
  float low_, high_;
};

// The same with Y: uint8 [N, ..., n] of the static format of the output.
class ConvU8Op : public ConvOp {
 public:
  static constexpr const char* kName = "ConvU8";
  static constexpr int kOutputType = kUint8;
  explicit ConvU8Op(const KernelInfo& info);
  void compute(KernelContext& context) const { run(context, true); }
};

// Y = the largest of each window of X, both uint8 [N, ..., C]
class MaxPoolU8Op {
 public:
  static constexpr const char* kName = "MaxPoolU8";
  static constexpr size_t kNumInputs = 1, kNumRequired = 1;
  static constexpr int kOutputType = kUint8;
  static int input_type(size_t) { return kUint8; }
  explicit MaxPoolU8Op(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  Geometry geometry_;
  bool ceil_;
};

// Y = rows of the table at the indices
class GatherOp {
 public:
  static constexpr const char* kName = "Gather";
  static constexpr size_t kNumInputs = 3, kNumRequired = 3;
  static constexpr int kOutputType = kFloat;
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
  static constexpr int kOutputType = kFloat;
  static int input_type(size_t index);
  explicit UnpackOp(const KernelInfo& info);
  void compute(KernelContext& context) const;

 private:
  PackedWeight weight_;
  std::vector<int64_t> dims_;
};

}  // namespace afpq::ort
