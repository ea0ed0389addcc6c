#include "drivers/panel.h"

#include <algorithm>

namespace afpq {
namespace {

constexpr float kNoBias[kPanelN] = {};

size_t dst_at(const GemmJob& job, const Panel& panel, size_t first) {
  return first * job.row_stride + panel.dst_channel * job.channel_stride;
}

// What is added later is clamped later.
AfpqStore store_of(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                   const float* src) {
  const bool clamps = !job.residual.floats;
  return {src,
          job.row_scales + first,
          job.bias ? job.bias + panel.first_block * kTileN : kNoBias,
          job.dst + dst_at(job, panel, first),
          count,
          panel.num_channels,
          job.row_stride,
          job.channel_stride,
          clamps ? job.low : -kInfinity,
          clamps ? job.high : kInfinity};
}

// A residual of floats, to what has been stored: runs of rows, or of channels.
void add_residual(const GemmJob& job, const Panel& panel, size_t first, size_t count) {
  if (!job.residual.floats) return;
  const size_t at = dst_at(job, panel, first);
  const bool planes = job.row_stride == 1;
  job.kernels->add_clamp_f32(job.residual.floats + at, planes ? job.channel_stride : job.row_stride,
                             planes ? panel.num_channels : count,
                             planes ? count : panel.num_channels, job.low, job.high, job.dst + at);
}

// To bytes, or with a residual in place.
AfpqStoreBytes store_bytes_of(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                              float* scaled) {
  const size_t at = first * job.byte_rows.stride + panel.dst_channel;
  const bool to_bytes = job.byte_rows.bytes;
  return {scaled,
          job.row_scales + first,
          job.bias ? job.bias + panel.first_block * kTileN : kNoBias,
          job.residual.bytes ? job.residual.bytes + at : nullptr,
          job.residual.zero,
          job.residual.scale,
          &job.byte_rows.quantize,
          to_bytes ? job.byte_rows.bytes + at : nullptr,
          to_bytes ? nullptr : scaled,
          count,
          panel.num_channels,
          job.byte_rows.stride,
          job.low,
          job.high};
}

// Whether the planes of a16 and of a pair have one sum, as words have anyway.
bool joins_planes(const GemmJob& job) {
  const Products& products = job.products;
  return products.elements == Elements::kBytes && products.lhs_planes == 2 &&
         products.rhs_planes == 2 && job.weight->fits_joined;
}

void join_planes(const GemmJob& job, const Panel& panel, size_t count, int32_t* const* sums) {
  if (!joins_planes(job)) return;
  // Modulo 2^32, which only steps on the way leave. Row r is made of rows 2 r and 2 r + 1.
  const auto* low = reinterpret_cast<const uint32_t*>(sums[0]);
  const auto* high = reinterpret_cast<const uint32_t*>(sums[1]);
  auto* dst = reinterpret_cast<uint32_t*>(sums[0]);
  for (size_t r = 0; r < count; ++r, dst += kPanelN, low += 2 * kPanelN, high += 2 * kPanelN) {
    for (size_t c = 0; c < panel.num_blocks * kTileN; ++c)
      dst[c] = (high[c] << 16) + ((high[kPanelN + c] + low[c]) << 8) + low[kPanelN + c];
  }
}

AfpqCombine combine_of(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                       size_t segment, int32_t* const* sums) {
  const PackedWeight& weight = *job.weight;
  const size_t sums_at = (segment * weight.num_blocks + panel.first_block) * kTileN;
  const int lhs_planes = joins_planes(job) ? 1 : job.products.lhs_planes;
  const int planes = joins_planes(job) ? 1 : job.products.rhs_planes;
  const bool joined = weight.format.num_planes() > planes;
  const auto column_sums = [&](int q) {
    return (joined ? weight.joined_sums : weight.column_sums[q]).data() + sums_at;
  };
  // Every member is named: zeros first would cost as much as all of this.
  return {{sums[0], planes == 2 ? sums[1] : nullptr},
          {column_sums(0), planes == 2 ? column_sums(1) : nullptr},
          job.zero_points + first,
          scales_of(job, panel, segment),
          nullptr,
          count,
          panel.num_channels,
          lhs_planes,
          planes,
          segment > 0};
}

}  // namespace

Panel panel_of(const GemmJob& job, size_t index) {
  const size_t channel = index * kPanelN;
  const size_t channels = std::min<size_t>(kPanelN, job.n - channel);
  return {job.first_block + index * kPanelBlocks, ceil_div(channels, kTileN), channels, channel};
}

const float* scales_of(const GemmJob& job, const Panel& panel, size_t segment) {
  const PackedWeight& weight = *job.weight;
  return weight.scales.data() +
         (weight.segments[segment].group * weight.num_blocks + panel.first_block) * kTileN;
}

void combine_rows(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                  size_t segment, int32_t* const* sums, float* scaled) {
  join_planes(job, panel, count, sums);
  AfpqCombine combine = combine_of(job, panel, first, count, segment, sums);
  combine.dst = scaled;
  job.kernels->combine_f32_s32(&combine);
}

bool finishes_at_once(const GemmJob& job) {
  if (job.products.elements == Elements::kFloats || job.weight->segments.size() > 1) return false;
  return job.byte_rows.bytes ? job.products.lhs_planes == 1 : !job.residual.bytes;
}

void finish_rows(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                 int32_t* const* sums) {
  join_planes(job, panel, count, sums);
  // Made in place: what has just been written in parts is slow to copy.
  if (!job.byte_rows.bytes) {
    const AfpqFinishFloats finish = {combine_of(job, panel, first, count, 0, sums),
                                     store_of(job, panel, first, count, nullptr)};
    job.kernels->finish_f32_s32(&finish);
    return add_residual(job, panel, first, count);
  }
  const AfpqFinish finish = {combine_of(job, panel, first, count, 0, sums),
                             store_bytes_of(job, panel, first, count, nullptr)};
  job.kernels->finish_u8_s32(&finish);
}

void store_rows(const GemmJob& job, const Panel& panel, size_t first, size_t count, float* scaled) {
  if (!job.byte_rows.bytes && !job.residual.bytes) {
    const AfpqStore store = store_of(job, panel, first, count, scaled);
    job.kernels->store_f32(&store);
    return add_residual(job, panel, first, count);
  }
  const AfpqStoreBytes bytes = store_bytes_of(job, panel, first, count, scaled);
  job.kernels->store_u8_f32(&bytes);
  if (job.byte_rows.bytes) return;
  // Finished rows go to their places: times 1, plus nothing.
  AfpqStore store = store_of(job, panel, first, count, scaled);
  store.row_scales = kOnes.data();
  store.bias = kNoBias;
  job.kernels->store_f32(&store);
}

}  // namespace afpq
