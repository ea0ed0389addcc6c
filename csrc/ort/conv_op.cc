#include <algorithm>

#include "ort/ops.h"

namespace afpq::ort {
namespace {

// An attribute with one value per spatial axis (or `count` values), or `missing` everywhere.
std::vector<int64_t> axes(const KernelInfo& info, const char* name, size_t count, int64_t missing,
                          int64_t least) {
  std::vector<int64_t> values = info.integers(name);
  if (values.empty()) values.assign(count, missing);
  if (values.size() != count || *std::min_element(values.begin(), values.end()) < least) {
    throw Error(kInvalidArgument, std::string("attribute ") + name + " is " + to_string(values) +
                                      ", needs " + std::to_string(count) + " values of at least " +
                                      std::to_string(least));
  }
  return values;
}

size_t tiles_of_tap(size_t group_in) { return group_in % kTileK == 0 ? group_in / kTileK : 1; }

}  // namespace

int ConvOp::input_type(size_t index) { return index == 1 ? kUint8 : index == 2 ? kAny : kFloat; }

ConvOp::ConvOp(const KernelInfo& info)
    : rounding_(read_activations(info)),
      low_(info.real("clip_min", -kInfinity)),
      high_(info.real("clip_max", kInfinity)) {
  read_axes(info);
  const size_t n = positive(info, "n"), k = positive(info, "k"), taps = base_.num_taps();
  base_.groups = static_cast<size_t>(std::max<int64_t>(info.integer("group", 1), 0));
  if (base_.groups == 0 || n % base_.groups) {
    throw Error(kInvalidArgument, "attribute group is " + std::to_string(base_.groups) +
                                      ", which does not divide n = " + std::to_string(n));
  }
  if (k % taps) {
    throw Error(kInvalidArgument, "attribute kernel_shape has " + std::to_string(taps) +
                                      " taps, which do not divide k = " + std::to_string(k));
  }
  if (info.integer("group_size", 0) != 0) {
    throw Error(kInvalidArgument, "attribute group_size is not supported by Conv");
  }
  base_.channels_out = n;
  base_.channels_in = k / taps * base_.groups;
  if (base_.group_in() % kTileK == 0 && base_.group_in() > 65536) {
    throw Error(kNotImplemented, "attribute k means " + std::to_string(base_.group_in()) +
                                     " channels per group, more than 65536");
  }
  const bool integer_sums = rounding_.mode != Activations::kF32 && !conv_is_planar(base_);
  weight_ = read_weight(info, 1, tiles_of_tap(base_.group_in()), integer_sums);
}

void ConvOp::read_axes(const KernelInfo& info) {
  const std::vector<int64_t> kernel = info.integers("kernel_shape");
  rank_ = kernel.size();
  if (rank_ < 1 || rank_ > 3) {
    throw Error(kInvalidArgument,
                "attribute kernel_shape is " + to_string(kernel) + ", needs 1 to 3 values");
  }
  axes(info, "kernel_shape", rank_, 1, 1);
  const std::vector<int64_t> strides = axes(info, "strides", rank_, 1, 1);
  const std::vector<int64_t> dilations = axes(info, "dilations", rank_, 1, 1);
  const std::vector<int64_t> pads = axes(info, "pads", 2 * rank_, 0, 0);
  for (size_t i = 0; i < rank_; ++i) {
    const size_t axis = 3 - rank_ + i;
    base_.kernel[axis] = static_cast<size_t>(kernel[i]);
    base_.strides[axis] = static_cast<size_t>(strides[i]);
    base_.dilations[axis] = static_cast<size_t>(dilations[i]);
    base_.pads[axis] = static_cast<size_t>(pads[i]);
    end_pads_[axis] = static_cast<size_t>(pads[rank_ + i]);
  }
  auto_pad_ = info.text("auto_pad", "NOTSET");
  if (auto_pad_ != "NOTSET" && auto_pad_ != "VALID" && auto_pad_ != "SAME_UPPER" &&
      auto_pad_ != "SAME_LOWER") {
    throw Error(kInvalidArgument, "attribute auto_pad is '" + auto_pad_ +
                                      "', not one of NOTSET, VALID, SAME_UPPER, SAME_LOWER");
  }
}

ConvShape ConvOp::shape_of(const std::vector<int64_t>& dims) const {
  if (dims.size() != rank_ + 2 || dims[1] != static_cast<int64_t>(base_.channels_in)) {
    throw Error(kInvalidArgument, "X has shape " + to_string(dims) + ", needs " +
                                      std::to_string(rank_ + 2) + " axes with " +
                                      std::to_string(base_.channels_in) + " channels");
  }
  ConvShape shape = base_;
  for (size_t axis = 3 - rank_; axis < 3; ++axis) {
    const size_t in = shape.in[axis] = static_cast<size_t>(dims[axis + rank_ - 1]);
    const size_t reach = (shape.kernel[axis] - 1) * shape.dilations[axis] + 1,
                 stride = shape.strides[axis];
    size_t begin = shape.pads[axis], end = end_pads_[axis];
    if (auto_pad_ == "VALID") begin = end = 0;
    if (auto_pad_[0] == 'S') {
      const size_t covered = (ceil_div(in, stride) - (in ? 1 : 0)) * stride + reach;
      const size_t total = covered > in ? covered - in : 0;
      begin = auto_pad_ == "SAME_UPPER" ? total / 2 : total - total / 2;
      end = total - begin;
    }
    if (in + begin + end < reach) {
      throw Error(kInvalidArgument,
                  "X has shape " + to_string(dims) + ", smaller than the kernel with its dilation");
    }
    shape.pads[axis] = begin;
    shape.out[axis] = (in + begin + end - reach) / stride + 1;
  }
  if (shape.num_in() * shape.channels_in >= size_t{1} << 31) {
    throw Error(kNotImplemented,
                "X has shape " + to_string(dims) + ", a sample of more than 2^31 elements");
  }
  return shape;
}

void ConvOp::compute(KernelContext& context) const {
  const Tensor x = float_input(context, 0, "X");
  const ConvShape shape = shape_of(x.dims);
  std::vector<int64_t> dims = {x.dims[0], static_cast<int64_t>(weight_.n)};
  for (size_t axis = 3 - rank_; axis < 3; ++axis)
    dims.push_back(static_cast<int64_t>(shape.out[axis]));
  Conv op;
  op.kernels = &kernels();
  op.weight = &weight_;
  op.rounding = rounding_;
  op.bias = read_bias(context, 3, weight_.n);
  op.low = low_;
  op.high = high_;
  float* y = context.output(0, dims);
  conv(op, shape, x.as<float>(), static_cast<size_t>(x.dims[0]), y, context.parallel());
}

}  // namespace afpq::ort
