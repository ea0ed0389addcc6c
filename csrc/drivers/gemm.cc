#include "drivers/gemm.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/scratch.h"

namespace afpq {
namespace {

constexpr size_t kBlockRows =
    48;  // rows whose sums and floats stay in L1 (a multiple of 16 and of 6)
constexpr size_t kFewRowsTiles =
    128;  // tiles of k expanded at a time when one block holds all rows: 32 KB
constexpr size_t kTargetTasks = 8;  // enough for a few threads; the pool is not asked for its size

// The part of a job that one task works on.
struct Panel {
  size_t first_block;   // of the weight
  size_t num_blocks;    // 1..kPanelBlocks
  size_t num_channels;  // 1..kPanelN
  size_t dst_channel;   // of the job
};

Panel panel_of(const GemmJob& job, size_t index) {
  const size_t channel = index * kPanelN;
  const size_t channels = std::min<size_t>(kPanelN, job.n - channel);
  return {job.first_block + index * kPanelBlocks, ceil_div(channels, kTileN), channels, channel};
}

size_t tap_tiles(const GemmJob& job) { return job.weight->num_tiles / job.lhs.num_taps; }

// Pointers of one register tile, as kernels.h wants them: [tap][kMaxRows]. `first` and `count` are
// in byte rows.
void byte_pointers(const LhsRows& lhs, int planes, size_t first, size_t count, size_t tap_begin,
                   size_t tap_end, size_t byte_offset, const uint8_t** out) {
  for (size_t i = 0; i < count; ++i) {
    const size_t row = (first + i) / planes;
    const int plane = static_cast<int>((first + i) % planes);
    const uint8_t* base = lhs.bytes[plane];
    if (lhs.offsets == nullptr) {
      out[i] = base + row * lhs.stride + byte_offset;
      continue;
    }
    const int32_t* offsets = lhs.offsets + row * lhs.num_taps;
    for (size_t tap = tap_begin; tap < tap_end; ++tap) {
      out[(tap - tap_begin) * kMaxRows + i] =
          offsets[tap] < 0 ? lhs.byte_padding[plane] : base + offsets[tap];
    }
  }
}

void float_pointers(const LhsRows& lhs, size_t first, size_t count, size_t tap_begin,
                    size_t tap_end, size_t element_offset, const float** out) {
  for (size_t i = 0; i < count; ++i) {
    if (lhs.offsets == nullptr) {
      out[i] = lhs.floats + (first + i) * lhs.stride + element_offset;
      continue;
    }
    const int32_t* offsets = lhs.offsets + (first + i) * lhs.num_taps;
    for (size_t tap = tap_begin; tap < tap_end; ++tap) {
      out[(tap - tap_begin) * kMaxRows + i] =
          offsets[tap] < 0 ? lhs.float_padding : lhs.floats + offsets[tap];
    }
  }
}

// Working memory of one task.
struct Workspace {
  int8_t* expanded[2];    // [num_blocks][tiles][64] for each weight plane
  float* expanded_f32;    // the same for float rows
  int32_t* sums[2];       // [kBlockRows * lhs planes][kPanelN]
  float* floats;          // [kBlockRows][kPanelN]: before the scales (float rows)
  float* scaled;          // [kBlockRows][kPanelN]
  const void** pointers;  // [taps][kMaxRows]
};

Workspace make_workspace(const GemmJob& job, size_t tiles, size_t pointer_taps) {
  const int planes = lhs_planes(job.mode, job.weight->format);
  const size_t codes = kPanelBlocks * tiles * kTileCodes;
  const size_t weight_planes = planes ? job.weight->format.num_planes() : 0;
  const size_t rows = std::min(job.m, kBlockRows);
  Scratch& scratch = task_scratch();
  using S = Scratch;
  scratch.reset(weight_planes *
                    (S::room<int8_t>(codes) + S::room<int32_t>(rows * planes * kPanelN)) +
                (planes ? 0 : S::room<float>(codes) + S::room<float>(rows * kPanelN)) +
                S::room<float>(rows * kPanelN) + S::room<void*>(pointer_taps * kMaxRows));
  Workspace work = {};
  for (size_t q = 0; q < weight_planes; ++q) {
    work.expanded[q] = scratch.take<int8_t>(codes);
    work.sums[q] = scratch.take<int32_t>(rows * planes * kPanelN);
  }
  if (!planes) {
    work.expanded_f32 = scratch.take<float>(codes);
    work.floats = scratch.take<float>(rows * kPanelN);
  }
  work.scaled = scratch.take<float>(rows * kPanelN);
  work.pointers = scratch.take<const void*>(pointer_taps * kMaxRows);
  return work;
}

// Expands tiles [begin, end) of every block of the panel.
void expand_panel(const GemmJob& job, const Panel& panel, size_t begin, size_t end,
                  const Workspace& work) {
  const PackedWeight& weight = *job.weight;
  const unsigned bits = weight.format.bits();
  const int8_t* tables[2] = {weight.tables.low, weight.tables.high};
  for (size_t b = 0; b < panel.num_blocks; ++b) {
    const uint8_t* src = weight.block(panel.first_block + b) + begin * weight.tile_bytes;
    const size_t place = b * (end - begin) * kTileCodes;
    if (work.expanded_f32) {
      job.kernels->expand_f32_afp(src, end - begin, bits, weight.tables.value,
                                  work.expanded_f32 + place);
      continue;
    }
    for (int q = 0; q < weight.format.num_planes(); ++q) {
      job.kernels->expand_s8_afp(src, end - begin, bits, tables[q], work.expanded[q] + place);
    }
  }
}

// Sums of rows [first, first + count) over tiles [begin, end) of k. The expanded tiles start at
// `base` and hold `tiles` per block.
void sum_tiles(const GemmJob& job, const Panel& panel, size_t first, size_t count, size_t begin,
               size_t end, size_t base, size_t tiles, bool accumulate, const Workspace& work) {
  const size_t per_tap = tap_tiles(job);
  const bool taps = job.lhs.offsets != nullptr;
  const size_t tap_begin = taps ? begin / per_tap : 0, tap_end = taps ? end / per_tap : 1;
  const size_t tile_count = taps ? per_tap : end - begin;
  const size_t place = (begin - base) * kTileCodes;
  const int planes = lhs_planes(job.mode, job.weight->format);
  if (!planes) {
    const float** pointers = reinterpret_cast<const float**>(work.pointers);
    for (size_t i = 0; i < count; i += kMaxRows) {
      const size_t rows = std::min<size_t>(kMaxRows, count - i);
      float_pointers(job.lhs, first + i, rows, tap_begin, tap_end, begin * kTileK, pointers);
      job.kernels->gemm_f32_f32_f32(pointers, tap_end - tap_begin, tile_count,
                                    work.expanded_f32 + place, tiles, rows, panel.num_blocks,
                                    accumulate, work.floats + i * kPanelN);
    }
    return;
  }
  const uint8_t** pointers = reinterpret_cast<const uint8_t**>(work.pointers);
  for (size_t i = 0; i < count * planes; i += kMaxRows) {
    const size_t rows = std::min<size_t>(kMaxRows, count * planes - i);
    byte_pointers(job.lhs, planes, first * planes + i, rows, tap_begin, tap_end, begin * kTileK,
                  pointers);
    for (int q = 0; q < job.weight->format.num_planes(); ++q) {
      job.kernels->gemm_s32_u8_s8(pointers, tap_end - tap_begin, tile_count,
                                  work.expanded[q] + place, tiles, rows, panel.num_blocks,
                                  accumulate, work.sums[q] + i * kPanelN);
    }
  }
}

// Sums of one segment -> scaled floats.
void combine_segment(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                     size_t segment, const Workspace& work) {
  const PackedWeight& weight = *job.weight;
  const size_t width = weight.num_blocks * kTileN, channel = panel.first_block * kTileN;
  const float* scales = weight.scales.data() + weight.segments[segment].group * width + channel;
  if (!lhs_planes(job.mode, weight.format)) {
    for (size_t r = 0; r < count; ++r) {
      const float* sums = work.floats + r * kPanelN;
      float* dst = work.scaled + r * kPanelN;
      for (size_t c = 0; c < panel.num_channels; ++c) {
        const float product = sums[c] * scales[c];
        dst[c] = segment == 0 ? product : dst[c] + product;
      }
    }
    return;
  }
  AfpqCombine combine = {};
  for (int q = 0; q < weight.format.num_planes(); ++q) {
    combine.sums[q] = work.sums[q];
    combine.column_sums[q] = weight.column_sums[q].data() + segment * width + channel;
  }
  combine.zero_points = job.zero_points + first;
  combine.scales = scales;
  combine.dst = work.scaled;
  combine.num_rows = count;
  combine.num_channels = panel.num_channels;
  combine.lhs_planes = lhs_planes(job.mode, weight.format);
  combine.rhs_planes = weight.format.num_planes();
  combine.accumulate = segment > 0;
  job.kernels->combine_f32_s32(&combine);
}

void store_rows(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                const Workspace& work) {
  static constexpr float kNoBias[kPanelN] = {};
  AfpqStore store = {};
  store.src = work.scaled;
  store.row_scales = job.row_scales + first;
  store.bias = job.bias ? job.bias + panel.first_block * kTileN : kNoBias;
  store.dst = job.dst + first * job.row_stride + panel.dst_channel * job.channel_stride;
  store.num_rows = count;
  store.num_channels = panel.num_channels;
  store.row_stride = job.row_stride;
  store.channel_stride = job.channel_stride;
  store.low = job.low;
  store.high = job.high;
  job.kernels->store_f32(&store);
}

// All rows fit one block: k is expanded a little at a time and used while it is in L1.
void gemm_few_rows(const GemmJob& job, const Panel& panel) {
  const Workspace work = make_workspace(job, kFewRowsTiles, 1);
  const std::vector<Segment>& segments = job.weight->segments;
  for (size_t s = 0; s < segments.size(); ++s) {
    for (size_t begin = segments[s].begin; begin < segments[s].end; begin += kFewRowsTiles) {
      const size_t end = std::min(begin + kFewRowsTiles, segments[s].end);
      expand_panel(job, panel, begin, end, work);
      sum_tiles(job, panel, 0, job.m, begin, end, begin, end - begin, begin > segments[s].begin,
                work);
    }
    combine_segment(job, panel, 0, job.m, s, work);
  }
  store_rows(job, panel, 0, job.m, work);
}

void gemm_many_rows(const GemmJob& job, const Panel& panel, size_t row_begin, size_t row_end) {
  const PackedWeight& weight = *job.weight;
  const Workspace work = make_workspace(job, weight.num_tiles, job.lhs.num_taps);
  expand_panel(job, panel, 0, weight.num_tiles, work);
  for (size_t first = row_begin; first < row_end; first += kBlockRows) {
    const size_t count = std::min(kBlockRows, row_end - first);
    for (size_t s = 0; s < weight.segments.size(); ++s) {
      const Segment& segment = weight.segments[s];
      sum_tiles(job, panel, first, count, segment.begin, segment.end, 0, weight.num_tiles, false,
                work);
      combine_segment(job, panel, first, count, s, work);
    }
    store_rows(job, panel, first, count, work);
  }
}

}  // namespace

void gemm(const GemmJob& job, const Parallel& parallel) {
  const size_t panels = ceil_div(job.n, kPanelN);
  if (job.m == 0) return;
  if (job.m <= kBlockRows && job.lhs.offsets == nullptr) {
    // A few panels a task keep the cost of handing out work below the work.
    const size_t bytes = kPanelBlocks * job.weight->num_tiles * job.weight->tile_bytes;
    const size_t chunk = std::max<size_t>(1, std::min(panels, (size_t{32} << 10) / bytes / job.m));
    parallel_for(parallel, ceil_div(panels, chunk), [&](size_t task) {
      for (size_t p = task * chunk; p < std::min(panels, (task + 1) * chunk); ++p) {
        gemm_few_rows(job, panel_of(job, p));
      }
    });
    return;
  }
  const size_t row_tasks = std::max<size_t>(1, kTargetTasks / panels);
  const size_t rows = ceil_div(ceil_div(job.m, row_tasks), kBlockRows) * kBlockRows;
  const size_t splits = ceil_div(job.m, rows);
  parallel_for(parallel, panels * splits, [&](size_t task) {
    const size_t begin = task / panels * rows;
    gemm_many_rows(job, panel_of(job, task % panels), begin, std::min(begin + rows, job.m));
  });
}

RowQuantizer row_quantizer(const LhsRounding& rounding, float low, float high, bool finite) {
  RowQuantizer result = {};
  result.quantize.num_planes = static_cast<int>(rounding.mode);
  if (!finite) {
    result.scale = std::numeric_limits<float>::quiet_NaN();
    return result;
  }
  if (rounding.scale > 0) {
    const float largest = static_cast<float>(rounding.format.max_integer());
    result.scale = result.quantize.scale = rounding.scale;
    result.quantize.low = rounding.format.is_signed ? -largest : 0.0f;
    result.quantize.high = largest;
    result.quantize.mantissa_bits = rounding.format.mantissa_bits;
    result.quantize.zero_point = rounding.format.is_signed ? 128 : 0;
    return result;
  }
  const float levels = rounding.mode == Activations::kA8 ? 255.0f : 65535.0f;
  result.scale = high / levels - low / levels;
  const float inverse = 1.0f / result.scale;
  if (!(result.scale > 0) || !std::isfinite(inverse)) {
    result.scale = 0;  // all zeros, or too small for float32 to scale: the row counts as zero
    return result;
  }
  result.quantize.inverse_scale = inverse;
  result.quantize.zero_point = static_cast<int32_t>(std::nearbyintf(-low * inverse));
  return result;
}

}  // namespace afpq
