// The path of convolutions whose pixels are rows of elements: bytes that come as they are, or
// floats that are rounded and turned channel-last, one sample at a time.
#include <algorithm>
#include <optional>
#include <vector>

#include "core/scratch.h"
#include "drivers/conv_paths.h"
#include "drivers/taps.h"

namespace afpq {
namespace {

constexpr size_t kTaskElements = size_t{1} << 15;

// Whether taps are read in place through offsets: not where pixel r is row r (1x1, stride 1, no
// padding), and not of depthwise layers, which find them themselves.
bool needs_offsets(const Conv& op, const ConvShape& shape) {
  if (conv_fits_depthwise(op, shape)) return false;
  for (int axis = 0; axis < 3; ++axis) {
    if (shape.kernel[axis] != 1 || shape.strides[axis] != 1 || shape.in[axis] != shape.out[axis] ||
        shape.pads[axis]) {
      return true;
    }
  }
  return false;
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
  const bool depthwise;
  const bool in_place;  // the source's bytes are the rows
  const OutputUnit unit;
  std::optional<TapOffsets> offsets;  // of taps that are read in place

  Job(const Conv& conv, const ConvShape& conv_shape, bool has_bytes, bool to_bytes)
      : op(conv),
        shape(conv_shape),
        products(conv_fits_depthwise(conv, conv_shape)
                     ? Products{Elements::kBytes, 1, 1}
                     : products_of(*conv.kernels, conv.rounding.mode, *conv.weight)),
        depthwise(conv_fits_depthwise(conv, conv_shape)),
        in_place(has_bytes && products.elements == Elements::kBytes),
        unit{to_bytes ? conv.dst_rounding.scale : 1.0f} {
    if (needs_offsets(op, shape)) offsets.emplace(shape, shape.channels_in);
  }

  size_t num_elements() const { return shape.num_in() * shape.channels_in; }
};

// The buffers of one sample: planes of elements.
struct Sample {
  uint8_t* pixels[2] = {nullptr, nullptr};   // [num_in][channels], unless they are the source's
  uint8_t* padding[2] = {nullptr, nullptr};  // [channels of a group]
  float* row_scales = nullptr;               // [num_out], in output units
  int32_t* zero_points = nullptr;
  const float* bias = nullptr;  // [channels_out], in output units
};

Sample allocate_sample(const Job& job) {
  const ConvShape& shape = job.shape;
  const size_t element = job.products.element_bytes(), planes = job.products.lhs_planes;
  const size_t pixels = job.in_place ? 0 : job.num_elements() * element;
  const size_t padding = shape.group_in() * element;
  using S = Scratch;
  Scratch& scratch = layer_scratch();
  scratch.reset(planes * (S::room<uint8_t>(pixels) + S::room<uint8_t>(padding)) +
                S::room<float>(shape.num_out()) + S::room<int32_t>(shape.num_out()) +
                S::room<float>(shape.channels_out));
  Sample sample;
  for (size_t p = 0; p < planes; ++p) {
    sample.pixels[p] = scratch.take<uint8_t>(pixels);
    sample.padding[p] = scratch.take<uint8_t>(padding);
  }
  sample.row_scales = scratch.take<float>(shape.num_out());
  sample.zero_points = scratch.take<int32_t>(shape.num_out());
  sample.bias = in_units(job.op.bias, shape.channels_out, job.unit, &scratch);
  return sample;
}

// What taps in the padding read. T: uint8_t, int16_t or float.
template <typename T>
void fill_padding(const Job& job, int plane, T padding, const Sample& sample) {
  T* row = reinterpret_cast<T*>(sample.padding[plane]);
  std::fill(row, row + job.shape.group_in(), padding);
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
    return fill_padding(job, 0, 0.0f, *sample);
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
    return fill_padding(job, 0, static_cast<int16_t>(zero), *sample);
  for (int p = 0; p < job.products.lhs_planes; ++p)
    fill_padding(job, p, quantizer.zero_byte(p), *sample);
}

// The product of one group of one sample, from its first output channel on.
GemmJob group_job(const Job& job, const ConvTarget& dst, size_t index, size_t group,
                  const Sample& sample) {
  const size_t channels = job.depthwise ? job.shape.channels_out : job.shape.group_out();
  const size_t begin = group * job.shape.group_in() * job.products.element_bytes();
  GemmJob result = conv_job(job.op, job.shape, job.products, dst,
                            {index, 0, job.shape.num_out(), group * channels, channels});
  for (int p = 0; p < job.products.lhs_planes; ++p) {
    result.lhs.planes[p] = sample.pixels[p] + begin;
    result.lhs.padding[p] = sample.padding[p];
  }
  result.lhs.stride = job.shape.channels_in;
  if (job.offsets) result.lhs.taps = &*job.offsets;
  result.row_scales = sample.row_scales;
  result.zero_points = sample.zero_points;
  result.bias = sample.bias;
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
      depthwise(group_job(job, dst, i, 0, sample), shape, parallel);
      continue;
    }
    for (size_t group = 0; group < shape.groups; ++group)
      gemm(group_job(job, dst, i, group, sample), parallel);
  }
}

}  // namespace afpq
