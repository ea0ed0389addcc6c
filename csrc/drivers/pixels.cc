#include "drivers/pixels.h"

#include <algorithm>
#include <cstring>

namespace afpq {
namespace {

constexpr size_t kLeastPixels = 8;  // fewer are rows

}  // namespace

PixelJob::PixelJob(const Conv& conv, const ConvShape& conv_shape, const Products& conv_products)
    : op(conv),
      shape(conv_shape),
      products(conv_products),
      steps(kPixelDword / conv_products.element_bytes()),
      plane_bytes(conv.weight->num_tiles * kTileCodes * conv_products.element_bytes()),
      block_bytes(plane_bytes * conv_products.rhs_planes) {}

void quantize_pixels(const PixelJob& job, const PixelSample& sample, const PixelRun& run,
                     const PixelRange& channels, uint8_t* dst) {
  dst += channels.begin / job.steps * run.stride * kPixelDword;
  AfpqQuantize quantize = sample.quantizer.quantize;
  quantize.planes[0] = dst;
  quantize.words = reinterpret_cast<int16_t*>(dst);
  const AfpqPixelSource source = {sample.floats + channels.begin * job.shape.num_in() + run.first,
                                  job.shape.num_in(),
                                  channels.end - channels.begin,
                                  run.num_rows,
                                  run.row_size,
                                  run.row_pitch,
                                  run.stride};
  (job.words() ? job.op.kernels->quantize_pixels_s16_f32 : job.op.kernels->quantize_pixels_u8_f32)(
      &source, &quantize);
}

void expand_pixel_block(const PixelJob& job, size_t block, uint8_t* dst) {
  const PackedWeight& weight = *job.op.weight;
  const unsigned bits = weight.format.bits();
  const FormatTables& tables = weight.tables;
  if (!job.words()) {
    return job.op.kernels->expand_s8_afp(weight.block(block), weight.num_tiles, bits, tables.low,
                                         reinterpret_cast<int8_t*>(dst));
  }
  for (int q = 0; q < job.products.rhs_planes; ++q, dst += job.plane_bytes) {
    job.op.kernels->expand_s16_afp(weight.block(block), weight.num_tiles, bits,
                                   job.products.rhs_planes == 1 ? tables.joined : tables.words[q],
                                   reinterpret_cast<int16_t*>(dst));
  }
}

void multiply_pixels(const PixelJob& job, const PixelSample& sample, const PixelRows& rows,
                     const PixelRange& channels, const uint8_t* rhs) {
  static constexpr float kNoBias[kTileN] = {};
  const PackedWeight& weight = *job.op.weight;
  const size_t channel = channels.begin;
  const bool joined = weight.format.num_planes() > job.products.rhs_planes;
  rhs += channel % kTileN * kPixelDword;
  AfpqPixels args = {};
  args.lhs = rows.lhs;
  args.taps = rows.taps;
  args.num_taps = rows.num_taps;
  args.pixel_stride = rows.stride;
  args.rhs = rhs;
  if (job.products.rhs_planes == 2) {
    args.rhs_high = rhs + job.plane_bytes;
    args.column_sums_high = weight.column_sums[1].data() + channel;
  }
  args.num_tiles = weight.num_tiles;
  args.num_pixels = rows.num_pixels;
  args.row_pitch = rows.pitch;
  args.row_size = rows.size;
  args.num_channels = channels.end - channel;
  args.limit = weight.limits[0];
  args.zero_point = sample.quantizer.zero_element(job.products.elements);
  args.column_sums = (joined ? weight.joined_sums : weight.column_sums[0]).data() + channel;
  args.scales = weight.scales.data() + channel;
  args.bias = job.op.bias ? job.op.bias + channel : kNoBias;
  args.row_scale = sample.quantizer.scale;
  // What is added later is clamped later.
  args.low = sample.residual ? -kInfinity : job.op.low;
  args.high = sample.residual ? kInfinity : job.op.high;
  const size_t at = channel * job.shape.num_out() + rows.first;
  args.dst = sample.dst + at;
  args.channel_stride = job.shape.num_out();
  if (job.words()) {
    job.op.kernels->gemm_pixels_f32_s16_s16(&args);
  } else {
    job.op.kernels->gemm_pixels_f32_u8_s8(&args);
  }
  if (sample.residual) {
    job.op.kernels->add_clamp_f32(sample.residual + at, args.channel_stride, args.num_channels,
                                  rows.count, job.op.low, job.op.high, args.dst);
  }
}

PixelSample pixel_sample(const PixelJob& job, const float* src, const ConvTarget& dst, size_t i,
                         const RowQuantizer& quantizer) {
  const ConvShape& shape = job.shape;
  const size_t at = i * shape.channels_out * shape.num_out();
  return {src + i * shape.channels_in * shape.num_in(), quantizer, dst.floats + at,
          dst.float_residual ? dst.float_residual + at : nullptr};
}

void PassedPanels::pass(const uint8_t* made, const PixelRange& channels, uint8_t* passed) const {
  const size_t begin = channels.begin / job.steps * group_bytes;
  const size_t end = channels.end / job.steps * group_bytes, panel = job.groups() * group_bytes;
  for (size_t p = 0; p < num_panels; ++p)
    std::copy(made + p * panel + begin, made + p * panel + end, passed + p * panel + begin);
}

void PassedPanels::receive(uint8_t* passed, const PixelRange& channels, uint8_t* made) const {
  const size_t begin = channels.begin / job.steps * group_bytes;
  const size_t end = channels.end / job.steps * group_bytes, panel = job.groups() * group_bytes;
  for (size_t p = 0; p < num_panels; ++p, passed += panel, made += panel) {
    for (size_t at = begin; at < end; at += kLine) {
      // Others may read the line at the same time: what is written is what was there.
      uint64_t* word = reinterpret_cast<uint64_t*>(passed + at);
      const uint64_t value = __atomic_load_n(word, __ATOMIC_RELAXED);
      std::memcpy(made + at, &value, sizeof(value));
      std::copy(passed + at + sizeof(value), passed + at + kLine, made + at + sizeof(value));
      __atomic_store_n(word, value, __ATOMIC_RELAXED);
    }
  }
}

bool conv_fits_pixels(const Conv& op, const ConvShape& shape, const Products& products) {
  const size_t lanes = op.kernels->pixel_lanes;
  // Where many lanes would be empty, rows are faster.
  const bool full = lanes && ceil_div(shape.num_out(), lanes) * lanes * 7 <= shape.num_out() * 8;
  return full && products.elements != Elements::kFloats && products.lhs_planes == 1 &&
         op.weight->segments.size() == 1 && shape.groups == 1 && shape.channels_in % kTileK == 0 &&
         shape.is_flat() && shape.num_out() >= kLeastPixels && shape.out[2] <= kMostPixels &&
         (products.elements == Elements::kWords ||
          (products.rhs_planes == 1 && op.weight->limits[0] <= op.kernels->a8_byte_limit));
}

void conv_pixels(const Conv& op, const ConvShape& shape, const Products& products, const float* src,
                 size_t batch, const ConvTarget& dst, const Parallel& parallel) {
  const PixelJob job(op, shape, products);
  const bool taps = shape.num_taps() > 1 || shape.strides[1] > 1 || shape.strides[2] > 1 ||
                    shape.num_in() != shape.num_out();
  (taps ? conv_pixel_planes : conv_pixel_panels)(job, src, batch, dst, parallel);
}

}  // namespace afpq
