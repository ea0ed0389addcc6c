#include "ort/ops.h"

#include "drivers/gather.h"

namespace afpq::ort {

int MatMulOp::input_type(size_t index) { return index == 1 ? kUint8 : index == 2 ? kAny : kFloat; }

MatMulOp::MatMulOp(const KernelInfo& info)
    : rounding_(read_activations(info)),
      weight_(read_weight(info, 1, 1, rounding_.mode != Activations::kF32)),
      bias_(info, 3, weight_.n),
      low_(info.real("clip_min", -kInfinity)),
      high_(info.real("clip_max", kInfinity)) {}

void MatMulOp::compute(KernelContext& context) const {
  const Tensor x = float_input(context, 0, "X");
  if (x.dims.empty() || x.dims.back() != static_cast<int64_t>(weight_.k)) {
    throw Error(kInvalidArgument, "X has shape " + to_string(x.dims) +
                                      ", its last axis must be k = " + std::to_string(weight_.k));
  }
  std::vector<int64_t> dims = x.dims;
  dims.back() = static_cast<int64_t>(weight_.n);
  Matmul op;
  op.kernels = &kernels();
  op.weight = &weight_;
  op.rounding = rounding_;
  op.bias = bias_.read(context);
  op.low = low_;
  op.high = high_;
  const Tensor residual = context.num_inputs() > 4 ? context.input(4) : Tensor();
  if (residual.data != nullptr) check_residual(residual, dims);
  float* y = context.output<float>(0, dims);
  matmul(op, x.as<float>(), x.size() / weight_.k, residual.as<float>(), y, context.parallel());
}

int GatherOp::input_type(size_t index) { return index == 0 ? kUint8 : kAny; }

GatherOp::GatherOp(const KernelInfo& info) : weight_(read_weight(info, 0, 1, false)) {}

void GatherOp::compute(KernelContext& context) const {
  const Tensor indices = context.input(2);
  std::vector<int64_t> wide(indices.size());
  if (indices.type == kInt64) {
    wide.assign(indices.as<int64_t>(), indices.as<int64_t>() + wide.size());
  } else if (indices.type == kInt32) {
    wide.assign(indices.as<int32_t>(), indices.as<int32_t>() + wide.size());
  } else {
    throw Error(kInvalidArgument, "indices must be int64 or int32");
  }
  std::vector<int64_t> dims = indices.dims;
  dims.push_back(static_cast<int64_t>(weight_.k));
  float* y = context.output<float>(0, dims);
  int64_t bad = 0;
  if (!gather(weight_, wide.data(), wide.size(), y, context.parallel(), &bad)) {
    throw Error(kInvalidArgument, "index " + std::to_string(bad) + " is not in the range " +
                                      std::to_string(-static_cast<int64_t>(weight_.n)) + ".." +
                                      std::to_string(weight_.n - 1));
  }
}

int UnpackOp::input_type(size_t index) { return index == 0 ? kUint8 : kAny; }

UnpackOp::UnpackOp(const KernelInfo& info)
    : weight_(read_weight(info, 0, 1, false)), dims_(info.integers("shape")) {
  size_t size = dims_.empty() ? 0 : 1;
  for (const int64_t dim : dims_) size *= static_cast<size_t>(dim);
  if (size != weight_.n * weight_.k) {
    throw Error(kInvalidArgument, "attribute shape is " + to_string(dims_) +
                                      ", which does not hold n * k = " +
                                      std::to_string(weight_.n * weight_.k) + " elements");
  }
}

void UnpackOp::compute(KernelContext& context) const {
  unpack(weight_, context.output<float>(0, dims_), context.parallel());
}

}  // namespace afpq::ort
