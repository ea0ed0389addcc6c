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

}  // namespace

Geometry::Geometry(const KernelInfo& info) {
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

void Geometry::check_pads() const {
  for (size_t axis = 3 - rank_; axis < 3; ++axis) {
    if (std::max(base_.pads[axis], end_pads_[axis]) >= base_.kernel[axis]) {
      throw Error(kInvalidArgument,
                  "attribute pads has a pad that is not smaller than the kernel, " +
                      std::to_string(base_.kernel[axis]) + " elements on axis " +
                      std::to_string(axis + rank_ - 3));
    }
  }
}

ConvShape Geometry::shape_of(const std::vector<int64_t>& dims, size_t first, bool ceil) const {
  ConvShape shape = base_;
  for (size_t axis = 3 - rank_; axis < 3; ++axis) {
    const size_t in = shape.in[axis] = static_cast<size_t>(dims[first + axis + rank_ - 3]);
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
    const size_t room = in + begin + end - reach;
    shape.out[axis] = room / stride + 1;
    // A window more, if it starts in the input or before it.
    if (ceil && room % stride && shape.out[axis] * stride < in + begin) ++shape.out[axis];
  }
  return shape;
}

}  // namespace afpq::ort
