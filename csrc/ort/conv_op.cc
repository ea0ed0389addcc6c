#include <algorithm>

#include "drivers/max_pool.h"
#include "ort/ops.h"

namespace afpq::ort {
namespace {

size_t tiles_of_tap(size_t group_in) { return group_in % kTileK == 0 ? group_in / kTileK : 1; }

// [N, C, ...] or, of bytes, [N, ..., C].
std::vector<int64_t> dims_of(const ConvShape& shape, size_t rank, int64_t batch, size_t channels,
                             bool bytes) {
  std::vector<int64_t> dims;
  dims.reserve(rank + 2);
  dims.push_back(batch);
  if (!bytes) dims.push_back(static_cast<int64_t>(channels));
  for (size_t axis = 3 - rank; axis < 3; ++axis)
    dims.push_back(static_cast<int64_t>(shape.out[axis]));
  if (bytes) dims.push_back(static_cast<int64_t>(channels));
  return dims;
}

void check_size(const ConvShape& shape, const std::vector<int64_t>& dims) {
  if (shape.num_in() * shape.channels_in >= size_t{1} << 31) {
    throw Error(kNotImplemented,
                "X has shape " + to_string(dims) + ", a sample of more than 2^31 elements");
  }
}

}  // namespace

int ConvOp::input_type(size_t index) { return index == 1 ? kUint8 : index == 3 ? kFloat : kAny; }

ConvOp::ConvOp(const KernelInfo& info)
    : geometry_(info),
      base_(geometry_.base()),
      rounding_(read_activations(info)),
      residual_rounding_(read_static_format(info, "residual")),
      bias_(info, 3, positive(info, "n")),
      low_(info.real("clip_min", -kInfinity)),
      high_(info.real("clip_max", kInfinity)) {
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
  const bool planar = conv_is_planar(base_, rounding_.scale > 0);
  const bool integer_sums = rounding_.mode != Activations::kF32 && !planar;
  weight_ = read_weight(info, 1, tiles_of_tap(base_.group_in()), integer_sums);
}

ConvShape ConvOp::shape_of(const Tensor& x) const {
  const size_t rank = geometry_.rank(), axis = x.type == kUint8 ? rank + 1 : 1;
  if (x.dims.size() != rank + 2 || x.dims[axis] != static_cast<int64_t>(base_.channels_in)) {
    throw Error(kInvalidArgument, "X has shape " + to_string(x.dims) + ", needs " +
                                      std::to_string(rank + 2) + " axes with " +
                                      std::to_string(base_.channels_in) + " channels on axis " +
                                      std::to_string(axis));
  }
  ConvShape shape = geometry_.shape_of(x.dims, axis == 1 ? 2 : 1, false);
  shape.channels_in = base_.channels_in;
  shape.channels_out = base_.channels_out;
  shape.groups = base_.groups;
  check_size(shape, x.dims);
  return shape;
}

void ConvOp::read_residual(const KernelContext& context, const ConvShape& shape, int64_t batch,
                           ConvTarget* dst) const {
  if (context.num_inputs() <= 4) return;
  const Tensor residual = context.input(4);
  if (residual.data == nullptr) return;
  const bool floats = residual.type == kFloat;
  if (!floats && residual.type != kUint8)
    throw Error(kInvalidArgument, "residual must be float32 or uint8");
  if (!floats && residual_rounding_.scale == 0)
    throw Error(kInvalidArgument, "attribute residual_format is missing, which bytes need");
  if (floats && dst->bytes)
    throw Error(kInvalidArgument, "residual must be uint8 where the output is");
  check_residual(residual, dims_of(shape, geometry_.rank(), batch, weight_.n, !floats));
  if (floats) {
    dst->float_residual = residual.as<float>();
  } else {
    dst->residual = residual.as<uint8_t>();
  }
}

void ConvOp::run(KernelContext& context, bool to_bytes) const {
  const Tensor x = context.input(0);
  if (x.type != kFloat && x.type != kUint8)
    throw Error(kInvalidArgument, "input X must be float32 or uint8");
  const ConvShape shape = shape_of(x);
  const auto dims = dims_of(shape, geometry_.rank(), x.dims[0], weight_.n, to_bytes);
  Conv op;
  op.kernels = &kernels();
  op.weight = &weight_;
  op.rounding = rounding_;
  op.bias = bias_.read(context);
  op.low = low_;
  op.high = high_;
  op.dst_rounding = dst_rounding_;
  op.residual_rounding = residual_rounding_;
  ConvSource src;
  ConvTarget dst;
  if (x.type == kUint8) {
    if (rounding_.scale == 0)
      throw Error(kInvalidArgument, "attribute activation_format is missing, which bytes need");
    src.bytes = x.as<uint8_t>();
  } else {
    src.floats = x.as<float>();
  }
  if (to_bytes) {
    dst.bytes = context.output<uint8_t>(0, dims);
  } else {
    dst.floats = context.output<float>(0, dims);
  }
  read_residual(context, shape, x.dims[0], &dst);
  if ((src.bytes || dst.residual) && !conv_multiplies_integers(op, shape)) {
    throw Error(kNotImplemented,
                "this convolution runs on floats: bytes cannot be its input or residual");
  }
  conv(op, shape, src, static_cast<size_t>(x.dims[0]), dst, context.parallel());
}

ConvU8Op::ConvU8Op(const KernelInfo& info) : ConvOp(info) {
  dst_rounding_ = read_static_format(info, "output");
  if (dst_rounding_.scale == 0) throw Error(kInvalidArgument, "attribute output_format is missing");
}

MaxPoolU8Op::MaxPoolU8Op(const KernelInfo& info)
    : geometry_(info), ceil_(info.integer("ceil_mode", 0) != 0) {
  geometry_.check_pads();
}

void MaxPoolU8Op::compute(KernelContext& context) const {
  const Tensor x = context.input(0);
  const size_t rank = geometry_.rank();
  if (x.dims.size() != rank + 2) {
    throw Error(kInvalidArgument, "X has shape " + to_string(x.dims) + ", needs " +
                                      std::to_string(rank + 2) + " axes");
  }
  ConvShape shape = geometry_.shape_of(x.dims, 1, ceil_);
  shape.channels_in = static_cast<size_t>(x.dims.back());
  check_size(shape, x.dims);
  const std::vector<int64_t> dims = dims_of(shape, rank, x.dims[0], shape.channels_in, true);
  max_pool(shape, x.as<uint8_t>(), static_cast<size_t>(x.dims[0]), context.output<uint8_t>(0, dims),
           context.parallel());
}

}  // namespace afpq::ort
