#include "drivers/panel.h"

#include <algorithm>

namespace afpq {
namespace {

constexpr float kNoBias[kPanelN] = {};

AfpqStore store_of(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                   const float* src) {
  return {src,
          job.row_scales + first,
          job.bias ? job.bias + panel.first_block * kTileN : kNoBias,
          job.dst + first * job.row_stride + panel.dst_channel * job.channel_stride,
          count,
          panel.num_channels,
          job.row_stride,
          job.channel_stride,
          job.low,
          job.high};
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

AfpqCombine combine_of(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                       size_t segment, const int32_t* const* sums) {
  const PackedWeight& weight = *job.weight;
  const size_t sums_at = (segment * weight.num_blocks + panel.first_block) * kTileN;
  const bool joined = weight.format.num_planes() > job.products.rhs_planes;
  const int planes = job.products.rhs_planes;
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
          job.products.lhs_planes,
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
                  size_t segment, const int32_t* const* sums, float* scaled) {
  AfpqCombine combine = combine_of(job, panel, first, count, segment, sums);
  combine.dst = scaled;
  job.kernels->combine_f32_s32(&combine);
}

bool finishes_at_once(const GemmJob& job) {
  if (job.products.elements == Elements::kFloats || job.weight->segments.size() > 1) return false;
  return job.byte_rows.bytes ? job.products.lhs_planes == 1 : !job.residual.bytes;
}

void finish_rows(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                 const int32_t* const* sums) {
  // Made in place: what has just been written in parts is slow to copy.
  if (!job.byte_rows.bytes) {
    const AfpqFinishFloats finish = {combine_of(job, panel, first, count, 0, sums),
                                     store_of(job, panel, first, count, nullptr)};
    return job.kernels->finish_f32_s32(&finish);
  }
  const AfpqFinish finish = {combine_of(job, panel, first, count, 0, sums),
                             store_bytes_of(job, panel, first, count, nullptr)};
  job.kernels->finish_u8_s32(&finish);
}

void store_rows(const GemmJob& job, const Panel& panel, size_t first, size_t count, float* scaled) {
  if (!job.byte_rows.bytes && !job.residual.bytes) {
    const AfpqStore store = store_of(job, panel, first, count, scaled);
    return job.kernels->store_f32(&store);
  }
  const AfpqStoreBytes bytes = store_bytes_of(job, panel, first, count, scaled);
  job.kernels->store_u8_f32(&bytes);
  if (job.byte_rows.bytes) return;
  // Finished rows go to their places: times 1, plus nothing.
  static constexpr float kOnes[kBlockRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                              1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                              1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  AfpqStore store = store_of(job, panel, first, count, scaled);
  store.row_scales = kOnes;
  store.bias = kNoBias;
  job.kernels->store_f32(&store);
}

}  // namespace afpq
