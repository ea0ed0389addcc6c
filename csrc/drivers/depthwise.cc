// Depthwise convolutions of bytes: each tap's channels meet their own weights, pixel by pixel.
//
//   for each task (a range of rows x a panel of 64 channels):            parallel
//     expand the panel's codes into words, pairs of taps next to each other
//     for each block of rows: sums of 6 rows at a time; scale, finish, store
#include <algorithm>

#include "core/scratch.h"
#include "drivers/panel.h"

namespace afpq {
namespace {

constexpr size_t kTaskWork = size_t{1} << 18;  // products that are worth a task

// Working memory of one task.
struct Workspace {
  int16_t* words;            // [blocks][tiles][64]
  int32_t* sums;             // [kBlockRows][kPanelN]
  float* scaled;             // [kBlockRows][kPanelN]
  const uint8_t** pointers;  // [taps][kMaxRows]

  explicit Workspace(const GemmJob& job) {
    using S = Scratch;
    const size_t codes = kPanelBlocks * job.weight->num_tiles * kTileCodes;
    const size_t count = kBlockRows * kPanelN, num_pointers = job.lhs.num_taps * kMaxRows;
    Scratch& scratch = task_scratch();
    scratch.reset(S::room<int16_t>(codes) + S::room<int32_t>(count) + S::room<float>(count) +
                  S::room<void*>(num_pointers));
    words = scratch.take<int16_t>(codes);
    sums = scratch.take<int32_t>(count);
    scaled = scratch.take<float>(count);
    pointers = scratch.take<const uint8_t*>(num_pointers);
  }
};

void expand(const GemmJob& job, const Panel& panel, int16_t* words) {
  const PackedWeight& weight = *job.weight;
  for (size_t b = 0; b < panel.num_blocks; ++b, words += weight.num_tiles * kTileCodes) {
    job.kernels->expand_s16_afp(weight.block(panel.first_block + b), weight.num_tiles,
                                weight.format.bits(), weight.tables.joined, words);
  }
}

// Where the taps of `count` rows are: [tap][kMaxRows].
void point_at(const LhsRows& lhs, size_t channel, size_t first, size_t count,
              const uint8_t** pointers) {
  const uint8_t* base = static_cast<const uint8_t*>(lhs.planes[0]) + channel;
  const uint8_t* padding = static_cast<const uint8_t*>(lhs.padding[0]);
  for (size_t i = 0; i < count; ++i) {
    const int32_t* offsets = lhs.offsets + (first + i) * lhs.num_taps;
    for (size_t tap = 0; tap < lhs.num_taps; ++tap)
      pointers[tap * kMaxRows + i] = offsets[tap] < 0 ? padding : base + offsets[tap];
  }
}

void run(const GemmJob& job, const Panel& panel, size_t begin, size_t end) {
  const Workspace work(job);
  expand(job, panel, work.words);
  const size_t channel = panel.first_block * kTileN;
  for (size_t first = begin; first < end; first += kBlockRows) {
    const size_t count = std::min(kBlockRows, end - first);
    for (size_t i = 0; i < count; i += kMaxRows) {
      const size_t rows = std::min<size_t>(kMaxRows, count - i);
      point_at(job.lhs, channel, first + i, rows, work.pointers);
      job.kernels->depthwise_s32_u8_s16(work.pointers, job.lhs.num_taps, work.words,
                                        job.weight->num_tiles, rows, panel.num_blocks,
                                        work.sums + i * kPanelN);
    }
    if (finishes_at_once(job)) {
      finish_rows(job, panel, first, count, &work.sums);
      continue;
    }
    combine_rows(job, panel, first, count, 0, &work.sums, work.scaled);
    store_rows(job, panel, first, count, work.scaled);
  }
}

}  // namespace

void depthwise(const GemmJob& job, const Parallel& parallel) {
  const size_t panels = ceil_div(job.n, kPanelN);
  const size_t most = std::max<size_t>(1, kTaskWork / (kPanelN * job.lhs.num_taps));
  const size_t rows = ceil_div(std::min(job.m, most), kBlockRows) * kBlockRows;
  const size_t splits = ceil_div(job.m, rows);
  parallel_for(parallel, panels * splits, [&](size_t task) {
    const size_t begin = task / panels * rows;
    run(job, panel_of(job, task % panels), begin, std::min(begin + rows, job.m));
  });
}

}  // namespace afpq
