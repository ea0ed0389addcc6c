#include "drivers/gemm.h"

#include <algorithm>

#include "core/scratch.h"
#include "drivers/panel.h"

namespace afpq {
namespace {

constexpr size_t kPointers = 1024;  // to rows, at a time: 8 KB
constexpr size_t kLeastRows = 24;   // of a task, for a panel to be worth its expansion
constexpr size_t kFewSteps = 128;   // of k, for writing outputs to take longer than an expansion

size_t tap_tiles(const GemmJob& job) { return job.weight->num_tiles / job.lhs.num_taps(); }

// The three kinds of elements: their types, the kernels that work on them, and the tiles of k that
// are expanded at a time when one block holds all rows (of 4 blocks, 16 or 32 KB of integers).
struct Bytes {
  static constexpr size_t kFewRowsTiles = 128;
  using Lhs = uint8_t;
  using Rhs = int8_t;
  using Sum = int32_t;
  static void expand(const GemmJob& job, const uint8_t* src, size_t tiles, int plane, Rhs* dst) {
    const FormatTables& tables = job.weight->tables;
    job.kernels->expand_s8_afp(src, tiles, job.weight->format.bits(),
                               plane == 0 ? tables.low : tables.high, dst);
  }
  static void gemm(const GemmJob& job, const Lhs* const* lhs, size_t taps, size_t tiles,
                   const Rhs* rhs, size_t rhs_tiles, size_t rows, size_t blocks, int plane,
                   int accumulate, const AfpqAhead& ahead, Sum* dst) {
    job.kernels->gemm_s32_u8_s8(lhs, taps, tiles, rhs, rhs_tiles, rows, blocks,
                                job.weight->limits[plane], accumulate, ahead, dst);
  }
};

struct Words {
  static constexpr size_t kFewRowsTiles = 32;
  using Lhs = int16_t;
  using Rhs = int16_t;
  using Sum = int32_t;
  static void expand(const GemmJob& job, const uint8_t* src, size_t tiles, int plane, Rhs* dst) {
    const FormatTables& tables = job.weight->tables;
    job.kernels->expand_s16_afp(src, tiles, job.weight->format.bits(),
                                job.products.rhs_planes == 1 ? tables.joined : tables.words[plane],
                                dst);
  }
  static void gemm(const GemmJob& job, const Lhs* const* lhs, size_t taps, size_t tiles,
                   const Rhs* rhs, size_t rhs_tiles, size_t rows, size_t blocks, int /*plane*/,
                   int accumulate, const AfpqAhead& /*ahead*/, Sum* dst) {
    job.kernels->gemm_s32_s16_s16(lhs, taps, tiles, rhs, rhs_tiles, rows, blocks, accumulate, dst);
  }
};

struct Floats {
  static constexpr size_t kFewRowsTiles = 128;
  using Lhs = float;
  using Rhs = float;
  using Sum = float;
  static void expand(const GemmJob& job, const uint8_t* src, size_t tiles, int /*plane*/,
                     Rhs* dst) {
    job.kernels->expand_f32_afp(src, tiles, job.weight->format.bits(), job.weight->tables.value,
                                dst);
  }
  static void gemm(const GemmJob& job, const Lhs* const* lhs, size_t taps, size_t tiles,
                   const Rhs* rhs, size_t rhs_tiles, size_t rows, size_t blocks, int /*plane*/,
                   int accumulate, const AfpqAhead& /*ahead*/, Sum* dst) {
    job.kernels->gemm_f32_f32_f32(lhs, taps, tiles, rhs, rhs_tiles, rows, blocks, accumulate, dst);
  }
};

// Pointers as kernels.h wants them: [tile of rows][tap][kMaxRows]. `first` and `count` are in rows
// of planes, of which there are 1 or 2.
template <typename T>
void row_pointers(const LhsRows& lhs, size_t planes, size_t first, size_t count,
                  size_t element_offset, const T** out) {
  if (planes == 1) {
    const T* row = static_cast<const T*>(lhs.planes[0]) + first * lhs.stride + element_offset;
    for (size_t i = 0; i < count; ++i, row += lhs.stride) out[i] = row;
    return;
  }
  for (size_t i = 0; i < count; ++i) {
    const size_t row = (first + i) / 2, plane = (first + i) % 2;
    out[i] = static_cast<const T*>(lhs.planes[plane]) + row * lhs.stride + element_offset;
  }
}

// Taps of pixels of a line: their number, and the first of them.
struct TapRun {
  size_t count, x;
};

// Pointers to taps [tap_begin, tap_end) of a run. begins: where the rows of the kernel begin.
template <typename T>
void run_pointers(const TapOffsets& offsets, const T* base, const T* padding, const TapRun& run,
                  const int32_t* begins, size_t tap_begin, size_t tap_end, const T** out) {
  const size_t columns = offsets.kernel_columns(), step = offsets.step();
  const int32_t *first = offsets.columns(run.x), *last = offsets.columns(run.x + run.count - 1);
  size_t ky = tap_begin / columns, kx = tap_begin % columns;
  for (size_t t = tap_begin; t < tap_end; ++t, out += kMaxRows) {
    const int32_t a = begins[ky], b = first[kx];
    if ((a | b | last[kx]) >= 0) {  // and so are those between
      const T* at = base + (a + b);
      for (size_t i = 0; i < run.count; ++i, at += step) out[i] = at;
    } else {
      for (size_t i = 0; i < run.count; ++i) {
        const int32_t column = first[i * columns + kx];
        out[i] = (a | column) < 0 ? padding : base + (a + column);
      }
    }
    if (++kx == columns) kx = 0, ++ky;
  }
}

// The same of taps [tap_begin, tap_end) of pixels. begins: room for the rows of a kernel.
template <typename T>
void tap_pointers(const LhsRows& lhs, size_t planes, size_t first, size_t count, size_t tap_begin,
                  size_t tap_end, int32_t* begins, const T** out) {
  const TapOffsets& offsets = *lhs.taps;
  const size_t taps = tap_end - tap_begin;
  size_t line = first / planes / offsets.line(), x = first / planes % offsets.line();
  offsets.find_begins(line, begins);
  for (size_t i = 0; i < count;) {
    const size_t plane = (first + i) % planes, row = i % kMaxRows;
    const size_t most = std::min({kMaxRows - row, offsets.line() - x, count - i});
    const TapRun run = {planes == 1 ? most : 1, x};
    run_pointers(offsets, static_cast<const T*>(lhs.planes[plane]),
                 static_cast<const T*>(lhs.padding[plane]), run, begins, tap_begin, tap_end,
                 out + (i - row) * taps + row);
    i += run.count;
    if (plane + 1 == planes) x += run.count;
    if (x < offsets.line() || i == count) continue;
    x = 0;
    offsets.find_begins(++line, begins);
  }
}

// Working memory of one task.
template <typename E>
struct Workspace {
  typename E::Rhs* expanded[2];      // [num_blocks][tiles][64] for each plane of the weight
  typename E::Sum* sums[2];          // [kBlockRows * lhs planes][kPanelN] for each
  float* scaled;                     // [kBlockRows][kPanelN]
  size_t row_tiles;                  // that are multiplied at a time
  const typename E::Lhs** pointers;  // [row_tiles][taps][kMaxRows]
  int32_t* begins;                   // of the rows of a kernel

  Workspace(const GemmJob& job, size_t tiles, size_t pointer_taps) {
    using S = Scratch;
    const size_t planes = job.products.rhs_planes, codes = kPanelBlocks * tiles * kTileCodes;
    const size_t rows = std::min(job.m, kBlockRows);
    const size_t sum_count = rows * job.products.lhs_planes * kPanelN;
    row_tiles = std::max<size_t>(1, kPointers / (pointer_taps * kMaxRows));
    row_tiles = std::min(row_tiles, ceil_div(rows * job.products.lhs_planes, kMaxRows));
    const size_t num_pointers = row_tiles * pointer_taps * kMaxRows;
    Scratch& scratch = task_scratch();
    scratch.reset(planes * (S::room<typename E::Rhs>(codes) + S::room<typename E::Sum>(sum_count)) +
                  S::room<float>(rows * kPanelN) + S::room<void*>(num_pointers) +
                  S::room<int32_t>(pointer_taps));
    for (size_t q = 0; q < planes; ++q) {
      expanded[q] = scratch.take<typename E::Rhs>(codes);
      sums[q] = scratch.take<typename E::Sum>(sum_count);
    }
    scaled = scratch.take<float>(rows * kPanelN);
    pointers = scratch.take<const typename E::Lhs*>(num_pointers);
    begins = scratch.take<int32_t>(pointer_taps);
  }
};

// Expands tiles [begin, end) of every block of the panel.
template <typename E>
void expand_panel(const GemmJob& job, const Panel& panel, size_t begin, size_t end,
                  const Workspace<E>& work) {
  const PackedWeight& weight = *job.weight;
  for (size_t b = 0; b < panel.num_blocks; ++b) {
    const uint8_t* src = weight.block(panel.first_block + b) + begin * weight.tile_bytes;
    for (int q = 0; q < job.products.rhs_planes; ++q) {
      E::expand(job, src, end - begin, q, work.expanded[q] + b * (end - begin) * kTileCodes);
    }
  }
}

// The codes of the panel that is next to be expanded, which would wait for memory: asked for while
// products of this one are made, which need none.
class NextCodes {
 public:
  NextCodes() = default;
  NextCodes(const GemmJob& job, const Panel& panel) {
    const PackedWeight& weight = *job.weight;
    const size_t next = panel.first_block + kPanelBlocks;
    const size_t end = std::min(next + kPanelBlocks, job.first_block + ceil_div(job.n, kTileN));
    if (next >= end) return;
    left_.begin = weight.block(next);
    left_.end = left_.begin + (end - next) * weight.num_tiles * weight.tile_bytes;
  }

  // The next lines of 64 bytes.
  AfpqAhead take(size_t lines) {
    const size_t bytes = std::min(lines * 64, static_cast<size_t>(left_.end - left_.begin));
    const AfpqAhead result = {left_.begin, left_.begin + bytes};
    left_.begin = result.end;
    return result;
  }

 private:
  AfpqAhead left_ = {};
};

// Sums of rows [first, first + count) over tiles [begin, end) of k. The expanded tiles start at
// `base` and hold `tiles` per block.
template <typename E>
void sum_tiles(const GemmJob& job, const Panel& panel, size_t first, size_t count, size_t begin,
               size_t end, size_t base, size_t tiles, bool accumulate, const Workspace<E>& work,
               NextCodes* codes) {
  const size_t per_tap = tap_tiles(job), planes = job.products.lhs_planes;
  const bool taps = job.lhs.taps != nullptr;
  const size_t tap_begin = taps ? begin / per_tap : 0, tap_end = taps ? end / per_tap : 1;
  const size_t tile_count = taps ? per_tap : end - begin;
  const size_t lines = (tap_end - tap_begin) * tile_count, step = work.row_tiles * kMaxRows;
  for (size_t i = 0; i < count * planes; i += step) {
    const size_t rows = std::min(step, count * planes - i);
    if (taps) {
      tap_pointers(job.lhs, planes, first * planes + i, rows, tap_begin, tap_end, work.begins,
                   work.pointers);
    } else {
      row_pointers(job.lhs, planes, first * planes + i, rows, begin * kTileK, work.pointers);
    }
    for (int q = 0; q < job.products.rhs_planes; ++q) {
      E::gemm(job, work.pointers, tap_end - tap_begin, tile_count,
              work.expanded[q] + (begin - base) * kTileCodes, tiles, rows, panel.num_blocks, q,
              accumulate, codes->take(ceil_div(rows, kMaxRows) * lines),
              work.sums[q] + i * kPanelN);
    }
  }
}

// Sums of one segment -> scaled floats.
void combine_segment(const GemmJob& job, const Panel& panel, size_t /*first*/, size_t count,
                     size_t segment, const float* scales, const Workspace<Floats>& work) {
  for (size_t r = 0; r < count; ++r) {
    const float* sums = work.sums[0] + r * kPanelN;
    float* dst = work.scaled + r * kPanelN;
    for (size_t c = 0; c < panel.num_channels; ++c) {
      const float product = sums[c] * scales[c];
      dst[c] = segment == 0 ? product : dst[c] + product;
    }
  }
  (void)job;
}

template <typename E>
void combine_segment(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                     size_t segment, const float* /*scales*/, const Workspace<E>& work) {
  combine_rows(job, panel, first, count, segment, work.sums, work.scaled);
}

// Sums of the only segment, finished at once where they can be.
bool finish_segment(const GemmJob&, const Panel&, size_t, size_t, const Workspace<Floats>&) {
  return false;
}

template <typename E>
bool finish_segment(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                    const Workspace<E>& work) {
  if (!finishes_at_once(job)) return false;
  finish_rows(job, panel, first, count, work.sums);
  return true;
}

// Sums of one segment of all rows, by codes; there are at most kMaxRows rows of planes.
template <typename E>
void sum_codes(const GemmJob& job, const Panel& panel, const Segment& segment,
               const Workspace<E>& work) {
  const PackedWeight& weight = *job.weight;
  const size_t planes = job.products.lhs_planes, rows = job.m * planes;
  row_pointers(job.lhs, planes, 0, rows, segment.begin * kTileK, work.pointers);
  for (size_t b = 0; b < panel.num_blocks; ++b) {
    const uint8_t* src = weight.block(panel.first_block + b) + segment.begin * weight.tile_bytes;
    for (int q = 0; q < job.products.rhs_planes; ++q) {
      job.kernels->gemm_s32_u8_afp(reinterpret_cast<const uint8_t* const*>(work.pointers), rows,
                                   src, segment.end - segment.begin, weight.format.bits(),
                                   q == 0 ? weight.tables.low : weight.tables.high, 0,
                                   reinterpret_cast<int32_t*>(work.sums[q]) + b * kTileN);
    }
  }
}

// All rows fit one block: k is expanded a little at a time and used while it is in L1, or in
// registers.
template <typename E>
void gemm_few_rows(const GemmJob& job, const Panel& panel) {
  const Workspace<E> work(job, E::kFewRowsTiles, 1);
  NextCodes none;
  const bool codes = job.products.elements == Elements::kBytes &&
                     job.m * job.products.lhs_planes <= static_cast<size_t>(job.kernels->code_rows);
  const std::vector<Segment>& segments = job.weight->segments;
  for (size_t s = 0; s < segments.size(); ++s) {
    if (codes) sum_codes(job, panel, segments[s], work);
    for (size_t begin = segments[s].begin; !codes && begin < segments[s].end;
         begin += E::kFewRowsTiles) {
      const size_t end = std::min(begin + E::kFewRowsTiles, segments[s].end);
      expand_panel(job, panel, begin, end, work);
      sum_tiles(job, panel, 0, job.m, begin, end, begin, end - begin, begin > segments[s].begin,
                work, &none);
    }
    if (finish_segment(job, panel, 0, job.m, work)) return;
    combine_segment(job, panel, 0, job.m, s, scales_of(job, panel, s), work);
  }
  store_rows(job, panel, 0, job.m, work.scaled);
}

template <typename E>
void gemm_many_rows(const GemmJob& job, const Panel& panel, size_t row_begin, size_t row_end) {
  const PackedWeight& weight = *job.weight;
  const Workspace<E> work(job, weight.num_tiles, job.lhs.num_taps());
  expand_panel(job, panel, 0, weight.num_tiles, work);
  NextCodes codes(job, panel);
  for (size_t first = row_begin; first < row_end; first += kBlockRows) {
    const size_t count = std::min(kBlockRows, row_end - first);
    if (finishes_at_once(job)) {
      sum_tiles(job, panel, first, count, 0, weight.num_tiles, 0, weight.num_tiles, false, work,
                &codes);
      finish_segment(job, panel, first, count, work);
      continue;
    }
    for (size_t s = 0; s < weight.segments.size(); ++s) {
      const Segment& segment = weight.segments[s];
      sum_tiles(job, panel, first, count, segment.begin, segment.end, 0, weight.num_tiles, false,
                work, &codes);
      combine_segment(job, panel, first, count, s, scales_of(job, panel, s), work);
    }
    store_rows(job, panel, first, count, work.scaled);
  }
}

template <typename E>
void gemm_of(const GemmJob& job, const Parallel& parallel) {
  const size_t panels = ceil_div(job.n, kPanelN);
  if (job.m <= kBlockRows && job.lhs.taps == nullptr) {
    // A few panels a task keep the cost of handing out work below the work.
    const size_t bytes = kPanelBlocks * job.weight->num_tiles * job.weight->tile_bytes;
    const size_t chunk = std::max<size_t>(1, std::min(panels, (size_t{32} << 10) / bytes / job.m));
    parallel_for(parallel, ceil_div(panels, chunk), [&](size_t task) {
      for (size_t p = task * chunk; p < std::min(panels, (task + 1) * chunk); ++p) {
        gemm_few_rows<E>(job, panel_of(job, p));
      }
    });
    return;
  }
  // Splits of rows differ by a block at most, or by a tile where there are few; an even number of
  // them suits two threads.
  const bool odd = panels % 2 && panels < job.num_tasks && job.num_tasks > 1;
  // Where little is computed for each line that is written, threads should have lines of their own,
  // and of the rows that the next layer reads: halves of rows share lines.
  const bool by_rows = job.byte_rows.bytes && job.num_tasks > 1 && job.weight->k <= kFewSteps;
  const size_t most = std::max<size_t>(odd || by_rows ? 2 : 1, job.num_tasks / panels);
  size_t splits = std::clamp<size_t>(job.m / kLeastRows, 1, most);
  if (splits > 1 && odd) splits += splits % 2;
  const size_t unit = job.m < 4 * splits * kBlockRows ? size_t{kMaxRows} : kBlockRows;
  const size_t units = ceil_div(job.m, unit);
  const auto row = [&](size_t split) { return std::min(split * units / splits * unit, job.m); };
  parallel_for(parallel, panels * splits, [&](size_t task) {
    const size_t split = task / panels;
    if (row(split) < row(split + 1))
      gemm_many_rows<E>(job, panel_of(job, task % panels), row(split), row(split + 1));
  });
}

}  // namespace

Products products_of(const AfpqKernels& kernels, Activations mode, const PackedWeight& weight,
                     size_t rows) {
  const int planes = weight.format.num_planes();
  if (planes == 0 || mode == Activations::kF32) return {};
  const bool by_codes = rows <= static_cast<size_t>(kernels.code_rows) / static_cast<size_t>(mode);
  const bool a16_words = mode == Activations::kA16 && kernels.a16_as_words && !by_codes;
  if (a16_words && weight.fits_joined) return {Elements::kWords, 1, 1};
  if (weight.fits_words && !by_codes) {
    if (a16_words) return {Elements::kWords, 1, planes};
    if (mode == Activations::kA8 && (planes == 2 || weight.limits[0] > kernels.a8_byte_limit))
      return {Elements::kWords, 1, 1};
  }
  return {Elements::kBytes, static_cast<int>(mode), planes};
}

void gemm(const GemmJob& job, const Parallel& parallel) {
  if (job.m == 0) return;
  const auto run = job.products.elements == Elements::kBytes   ? gemm_of<Bytes>
                   : job.products.elements == Elements::kWords ? gemm_of<Words>
                                                               : gemm_of<Floats>;
  run(job, parallel);
}

}  // namespace afpq
