// What the loop nests of gemm.cc and depthwise.cc share: panels of 64 channels, and what becomes of
// sums.
#pragma once

#include <array>

#include "drivers/gemm.h"

namespace afpq {

// Rows whose sums and floats stay in L1 (a multiple of 16 and of 6).
constexpr size_t kBlockRows = 48;

// Row scales of rows that are finished.
constexpr std::array<float, kBlockRows> make_ones() {
  std::array<float, kBlockRows> ones = {};
  for (size_t i = 0; i < kBlockRows; ++i) ones[i] = 1.0f;
  return ones;
}
inline constexpr std::array<float, kBlockRows> kOnes = make_ones();

// The part of a job that one task works on.
struct Panel {
  size_t first_block;   // of the weight
  size_t num_blocks;    // 1..kPanelBlocks
  size_t num_channels;  // 1..kPanelN
  size_t dst_channel;   // of the job
};

Panel panel_of(const GemmJob& job, size_t index);

// The scales of a segment for the panel's channels.
const float* scales_of(const GemmJob& job, const Panel& panel, size_t segment);

// Integer sums of one segment, [count * lhs planes][kPanelN] for each plane of the weight, which
// may be changed, become floats, [count][kPanelN]; those of later segments are added.
void combine_rows(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                  size_t segment, int32_t* const* sums, float* scaled);

// Whether sums can be finished at once: one segment, to bytes with one plane of lhs, or to floats
// without a residual of bytes.
bool finishes_at_once(const GemmJob& job);

// Does it: combine_rows and store_rows.
void finish_rows(const GemmJob& job, const Panel& panel, size_t first, size_t count,
                 int32_t* const* sums);

// Finishes rows [first, first + count) and writes them where the job says; `scaled` may be changed.
void store_rows(const GemmJob& job, const Panel& panel, size_t first, size_t count, float* scaled);

}  // namespace afpq
