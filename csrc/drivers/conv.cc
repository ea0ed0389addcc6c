#include "drivers/conv.h"

#include <algorithm>

#include "drivers/conv_paths.h"

namespace afpq {
namespace {

constexpr size_t kTaskElements = size_t{1} << 15;
constexpr size_t kRangeElements = size_t{1} << 13;  // of more than that
constexpr size_t kLeastRow = 8;                     // pixels
constexpr size_t kSmallSample = size_t{1} << 22;    // products that are not worth more than a task
constexpr size_t kSamplesWork = size_t{1} << 21;    // products that are worth a task of samples

// Sample i of a batch.
template <typename T>
T* moved(T* data, size_t count) {
  return data ? data + count : nullptr;
}

ConvSource sample_of(const ConvShape& shape, const ConvSource& src, size_t i) {
  const size_t at = i * shape.channels_in * shape.num_in();
  return {moved(src.floats, at), moved(src.bytes, at)};
}

ConvTarget sample_of(const ConvShape& shape, const ConvTarget& dst, size_t i) {
  const size_t at = i * shape.channels_out * shape.num_out();
  return {moved(dst.floats, at), moved(dst.bytes, at), moved(dst.residual, at),
          moved(dst.float_residual, at)};
}

bool runs_on_planes(const Conv& op, const ConvShape& shape) {
  return conv_is_planar(shape, op.rounding.scale > 0 && op.weight->format.num_planes() > 0);
}

// Samples, each of them split into tasks.
void conv_samples(const Conv& op, const ConvShape& shape, const ConvSource& src, size_t batch,
                  const ConvTarget& dst, const Parallel& parallel) {
  const bool floats = src.floats && dst.floats && !dst.residual;
  if (runs_on_planes(op, shape)) {
    // Rows of output shorter than a vector leave it half empty: channels fill one.
    if (shape.groups == 1 && (dst.bytes || shape.out[2] < kLeastRow))
      return conv_planar_rows(op, shape, src.floats, batch, dst, parallel);
    if (dst.floats && conv_fits_lanes(shape))
      return conv_planar_lanes(op, shape, src.floats, batch, dst, parallel);
    return conv_planar(op, shape, src.floats, batch, dst, parallel);
  }
  const Products products = products_of(*op.kernels, op.rounding.mode, *op.weight);
  if (floats && conv_fits_pixels(op, shape, products))
    return conv_pixels(op, shape, products, src.floats, batch, dst, parallel);
  // Channels that do not fill steps of k are copied into them.
  const bool patches = shape.groups == 1 && shape.channels_in % kTileK != 0;
  (patches ? conv_patches : conv_rows)(op, shape, src, batch, dst, parallel);
}

}  // namespace

RowQuantizer sample_quantizer(const Conv& op, const ConvShape& shape, const float* src,
                              const Parallel& parallel) {
  const size_t total = shape.num_in() * shape.channels_in;
  const size_t size = total <= kTaskElements ? kTaskElements : kRangeElements;
  const size_t parts = ceil_div(total, size);
  std::vector<AfpqRange> ranges(parts);  // none of an input that is all padding
  parallel_for(parallel, parts, [&](size_t part) {
    const size_t begin = part * size;
    op.kernels->range_f32(src + begin, std::min(size, total - begin), &ranges[part]);
  });
  return row_quantizer(op.rounding, widest(ranges.data(), parts));
}

void quantize_planes(const AfpqKernels& kernels, const Products& products,
                     const RowQuantizer& quantizer, const float* src, size_t count, size_t channels,
                     uint8_t* const* rows, const Parallel& parallel) {
  const auto transpose = products.elements == Elements::kWords ? kernels.quantize_transpose_s16_f32
                                                               : kernels.quantize_transpose_u8_f32;
  const size_t step = std::max<size_t>(16, kTaskElements / channels / 16 * 16);
  parallel_for(parallel, ceil_div(count, step), [&](size_t task) {
    AfpqQuantize quantize = quantizer.quantize;
    const size_t begin = task * step;
    for (int p = 0; p < products.lhs_planes; ++p) quantize.planes[p] = rows[p] + begin * channels;
    quantize.words = reinterpret_cast<int16_t*>(rows[0]) + begin * channels;
    transpose(src + begin, count, channels, std::min(step, count - begin), &quantize);
  });
}

GemmJob conv_job(const Conv& op, const ConvShape& shape, const Products& products,
                 const ConvTarget& dst, const JobRange& range) {
  const OutputUnit unit = {dst.bytes ? op.dst_rounding.scale : 1.0f};
  const size_t sample = range.index * shape.channels_out * shape.num_out();
  GemmJob job;
  job.kernels = op.kernels;
  job.weight = op.weight;
  job.products = products;
  job.low = unit(op.low);
  job.high = unit(op.high);
  const size_t row = sample + range.first * shape.channels_out + range.channel;
  job.byte_rows.stride = shape.channels_out;
  if (dst.residual) {
    const RowQuantizer residual = static_quantizer(op.residual_rounding);
    job.residual = {nullptr, dst.residual + row, residual.quantize.zero_point,
                    unit(residual.scale)};
  }
  if (dst.bytes) {
    job.byte_rows.bytes = dst.bytes + row;
    job.byte_rows.quantize = step_quantizer(op.dst_rounding);
  } else {
    const size_t at = sample + range.channel * shape.num_out() + range.first;
    job.dst = dst.floats + at;
    if (dst.float_residual) job.residual.floats = dst.float_residual + at;
    job.row_stride = 1;
    job.channel_stride = shape.num_out();
  }
  job.m = range.count;
  job.first_block = range.channel / kTileN;
  job.n = range.channels;
  return job;
}

bool conv_fits_depthwise(const Conv& op, const ConvShape& shape) {
  return conv_is_depthwise(shape) && op.rounding.scale > 0 && op.weight->format.num_planes() > 0;
}

bool conv_multiplies_integers(const Conv& op, const ConvShape& shape) {
  return op.rounding.mode != Activations::kF32 && op.weight->format.num_planes() > 0 &&
         !runs_on_planes(op, shape);
}

void conv(const Conv& op, const ConvShape& shape, const ConvSource& src, size_t batch,
          const ConvTarget& dst, const Parallel& parallel) {
  if (shape.num_out() == 0 || batch == 0) return;
  const size_t work = shape.num_out() * shape.channels_out * op.weight->k;
  if (batch == 1 || work > kSmallSample) return conv_samples(op, shape, src, batch, dst, parallel);
  const size_t step = std::clamp<size_t>(kSamplesWork / work, 1, ceil_div(batch, 2));
  parallel_for(parallel, ceil_div(batch, step), [&](size_t task) {
    const size_t first = task * step;
    conv_samples(op, shape, sample_of(shape, src, first), std::min(step, batch - first),
                 sample_of(shape, dst, first), serial());
  });
}

}  // namespace afpq
