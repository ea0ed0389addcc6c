// The path of convolutions whose pixels are rows of elements: bytes that come as they are, or
// floats that are rounded and turned channel-last, one sample at a time.
#include <algorithm>
#include <optional>
#include <vector>

#include "core/scratch.h"
#include "drivers/conv_paths.h"
#include "drivers/patches.h"
#include "drivers/taps.h"

namespace afpq {
namespace {

constexpr size_t kTaskElements = size_t{1} << 15;

// How taps find their rows.
enum class Taps {
  kDirect,   // 1x1, stride 1, no padding: pixel r is row r; or depthwise, which finds them itself
  kOffsets,  // taps are read in place
  kPatches,  // taps of a pixel are copied into one row
};

Taps taps_of(const Conv& op, const ConvShape& shape) {
  if (conv_fits_depthwise(op, shape)) return Taps::kDirect;
  if (shape.group_in() % kTileK != 0) return Taps::kPatches;
  for (int axis = 0; axis < 3; ++axis) {
    if (shape.kernel[axis] != 1 || shape.strides[axis] != 1 || shape.in[axis] != shape.out[axis] ||
        shape.pads[axis]) {
      return Taps::kOffsets;
    }
  }
  return Taps::kDirect;
}

// Rows of bytes to rows of words.
void widen(const uint8_t* src, size_t count, const Parallel& parallel, int16_t* dst) {
  parallel_for(parallel, ceil_div(count, kTaskElements), [&](size_t task) {
    const size_t begin = task * kTaskElements, end = std::min(begin + kTaskElements, count);
    for (size_t i = begin; i < end; ++i) dst[i] = src[i];
  });
}

// What the steps of a convolution have in common.
struct Job {
  const Conv& op;
  const ConvShape& shape;
  const Products products;
  const Taps taps;
  const bool depthwise;
  const size_t patch;   // elements of a patch: k, in whole tiles
  const bool in_place;  // the source's bytes are the rows
  const OutputUnit unit;
  std::optional<TapOffsets> offsets;  // of taps that are read in place

  Job(const Conv& conv, const ConvShape& conv_shape, bool has_bytes, bool to_bytes)
      : op(conv),
        shape(conv_shape),
        products(conv_fits_depthwise(conv, conv_shape)
                     ? Products{Elements::kBytes, 1, 1}
                     : products_of(*conv.kernels, conv.rounding.mode, *conv.weight)),
        taps(taps_of(conv, conv_shape)),
        depthwise(conv_fits_depthwise(conv, conv_shape)),
        patch(conv.weight->num_tiles * kTileK),
        in_place(has_bytes && products.elements == Elements::kBytes),
        unit{to_bytes ? conv.dst_rounding.scale : 1.0f} {
    if (taps == Taps::kOffsets) offsets.emplace(shape, shape.channels_in);
  }

  size_t num_elements() const { return shape.num_in() * shape.channels_in; }
};

// The buffers of one sample: planes of elements.
struct Sample {
  uint8_t* pixels[2] = {nullptr, nullptr};   // [num_in][channels], unless they are the source's
  uint8_t* padded[2] = {nullptr, nullptr};   // the same with padding, of patches
  uint8_t* patches[2] = {nullptr, nullptr};  // [num_out][patch]
  uint8_t* padding[2] = {nullptr, nullptr};  // [channels of a group]
  float* row_scales = nullptr;               // [num_out], in output units
  int32_t* zero_points = nullptr;
  float* bias = nullptr;  // [channels_out], in output units
};

Sample allocate_sample(const Job& job) {
  const ConvShape& shape = job.shape;
  const size_t element = job.products.element_bytes(), planes = job.products.lhs_planes;
  const size_t pixels = job.in_place ? 0 : job.num_elements() * element;
  const size_t padding = shape.group_in() * element;
  const bool has_patches = job.taps == Taps::kPatches;
  const size_t padded = has_patches ? PaddedInput(shape).num_elements() * element : 0;
  const size_t patches = has_patches ? shape.num_out() * job.patch * element : 0;
  using S = Scratch;
  Scratch& scratch = layer_scratch();
  scratch.reset(planes * (S::room<uint8_t>(pixels) + S::room<uint8_t>(padded) +
                          S::room<uint8_t>(patches) + S::room<uint8_t>(padding)) +
                S::room<float>(shape.num_out()) + S::room<int32_t>(shape.num_out()) +
                S::room<float>(shape.channels_out));
  Sample sample;
  for (size_t p = 0; p < planes; ++p) {
    sample.pixels[p] = scratch.take<uint8_t>(pixels);
    sample.padded[p] = scratch.take<uint8_t>(padded);
    sample.patches[p] = scratch.take<uint8_t>(patches);
    sample.padding[p] = scratch.take<uint8_t>(padding);
  }
  sample.row_scales = scratch.take<float>(shape.num_out());
  sample.zero_points = scratch.take<int32_t>(shape.num_out());
  if (const float* bias = job.op.bias) {
    sample.bias = scratch.take<float>(shape.channels_out);
    std::transform(bias, bias + shape.channels_out, sample.bias, job.unit);
  }
  return sample;
}

// What taps in the padding read, and patches where there are some. T: uint8_t, int16_t or float.
template <typename T>
void fill_padding(const Job& job, int plane, T padding, const Sample& sample,
                  const Parallel& parallel) {
  T* row = reinterpret_cast<T*>(sample.padding[plane]);
  std::fill(row, row + job.shape.group_in(), padding);
  if (job.taps != Taps::kPatches) return;
  T* padded = reinterpret_cast<T*>(sample.padded[plane]);
  pad_input(job.shape, reinterpret_cast<const T*>(sample.pixels[plane]), padding, padded);
  gather_patches(job.shape, padded, job.patch, parallel,
                 reinterpret_cast<T*>(sample.patches[plane]));
}

// The pixels of a sample that comes as floats. Returns how they were rounded.
RowQuantizer round_pixels(const Job& job, const float* src, const Sample& sample,
                          const Parallel& parallel) {
  const RowQuantizer quantizer = sample_quantizer(job.op, job.shape, src, parallel);
  quantize_planes(*job.op.kernels, job.products, quantizer, src, job.shape.num_in(),
                  job.shape.channels_in, sample.pixels, parallel);
  return quantizer;
}

// The pixels of a sample that comes as bytes.
void take_pixels(const Job& job, const uint8_t* src, Sample* sample, const Parallel& parallel) {
  if (job.in_place) {
    sample->pixels[0] = const_cast<uint8_t*>(src);
  } else {
    widen(src, job.num_elements(), parallel, reinterpret_cast<int16_t*>(sample->pixels[0]));
  }
}

void fill_rows(const Job& job, const ConvSource& src, size_t index, Sample* sample,
               const Parallel& parallel) {
  const size_t count = job.shape.num_out(), begin = index * job.num_elements();
  if (job.products.elements == Elements::kFloats) {
    job.op.kernels->transpose_f32(src.floats + begin, job.shape.num_in(), job.shape.channels_in,
                                  job.shape.num_in(), reinterpret_cast<float*>(sample->pixels[0]));
    std::fill(sample->row_scales, sample->row_scales + count, job.unit(1.0f));
    return fill_padding(job, 0, 0.0f, *sample, parallel);
  }
  RowQuantizer quantizer;
  if (src.bytes) {
    quantizer = static_quantizer(job.op.rounding);
    take_pixels(job, src.bytes + begin, sample, parallel);
  } else {
    quantizer = round_pixels(job, src.floats + begin, *sample, parallel);
  }
  const int32_t zero = quantizer.zero_element(job.products.elements);
  std::fill(sample->row_scales, sample->row_scales + count, job.unit(quantizer.scale));
  std::fill(sample->zero_points, sample->zero_points + count, zero);
  if (job.products.elements == Elements::kWords)
    return fill_padding(job, 0, static_cast<int16_t>(zero), *sample, parallel);
  for (int p = 0; p < job.products.lhs_planes; ++p) {
    const bool high = p == 0 && job.products.lhs_planes == 2;
    fill_padding(job, p, static_cast<uint8_t>(high ? zero >> 8 : zero & 255), *sample, parallel);
  }
}

LhsRows rows_of_group(const Job& job, size_t group, const Sample& sample) {
  LhsRows rows;
  const bool patches = job.taps == Taps::kPatches;
  const size_t begin = group * job.shape.group_in() * job.products.element_bytes();
  for (int p = 0; p < job.products.lhs_planes; ++p) {
    rows.planes[p] = patches ? sample.patches[p] : sample.pixels[p] + begin;
    rows.padding[p] = sample.padding[p];
  }
  rows.stride = patches ? job.patch : job.shape.channels_in;
  if (job.offsets) rows.taps = &*job.offsets;
  return rows;
}

// The product of one group of one sample, from its first output channel on.
GemmJob gemm_job(const Job& job, const ConvTarget& dst, size_t index, size_t group,
                 const Sample& sample) {
  const ConvShape& shape = job.shape;
  const size_t channels = job.depthwise ? shape.channels_out : shape.group_out();
  const size_t channel = group * channels;
  const size_t begin = index * shape.channels_out * shape.num_out();
  GemmJob result;
  result.kernels = job.op.kernels;
  result.weight = job.op.weight;
  result.products = job.products;
  result.lhs = rows_of_group(job, group, sample);
  result.row_scales = sample.row_scales;
  result.zero_points = sample.zero_points;
  result.bias = sample.bias;
  result.low = job.unit(job.op.low);
  result.high = job.unit(job.op.high);
  result.byte_rows.stride = shape.channels_out;
  if (dst.residual) {
    const RowQuantizer residual = static_quantizer(job.op.residual_rounding);
    result.residual = {nullptr, dst.residual + begin + channel, residual.quantize.zero_point,
                       job.unit(residual.scale)};
  }
  if (dst.bytes) {
    result.byte_rows.bytes = dst.bytes + begin + channel;
    result.byte_rows.quantize = step_quantizer(job.op.dst_rounding);
  } else {
    const size_t at = begin + channel * shape.num_out();
    result.dst = dst.floats + at;
    if (dst.float_residual) result.residual.floats = dst.float_residual + at;
    result.row_stride = 1;
    result.channel_stride = shape.num_out();
  }
  result.m = shape.num_out();
  result.first_block = channel / kTileN;
  result.n = channels;
  return result;
}

}  // namespace

void conv_rows(const Conv& op, const ConvShape& shape, const ConvSource& src, size_t batch,
               const ConvTarget& dst, const Parallel& parallel) {
  const Job job(op, shape, src.bytes != nullptr, dst.bytes != nullptr);
  Sample sample = allocate_sample(job);
  for (size_t i = 0; i < batch; ++i) {
    fill_rows(job, src, i, &sample, parallel);
    if (job.depthwise) {
      depthwise(gemm_job(job, dst, i, 0, sample), shape, parallel);
      continue;
    }
    for (size_t group = 0; group < shape.groups; ++group)
      gemm(gemm_job(job, dst, i, group, sample), parallel);
  }
}

}  // namespace afpq
