// Depthwise convolutions of bytes: each tap's channels meet their own weights. Pixels whose taps
// are all inside come in runs; those at the borders one by one.
//
//   for each task (a range of rows x a panel of 64 channels):            parallel
//     expand the panel's codes into words, pairs of taps next to each other
//     for each block of rows: sums of pixels next to each other; scale, finish, store
#include <algorithm>

#include "core/scratch.h"
#include "drivers/conv_paths.h"
#include "drivers/panel.h"

namespace afpq {
namespace {

constexpr size_t kTaskWork = size_t{1} << 18;  // products that are worth a task

// Working memory of one task.
struct Workspace {
  int16_t* words;        // [blocks][tiles][64]
  int32_t* sums;         // [kBlockRows][kPanelN]
  float* scaled;         // [kBlockRows][kPanelN]
  const uint8_t** taps;  // [num_taps], of a pixel

  Workspace(const GemmJob& job, size_t num_taps) {
    using S = Scratch;
    const size_t codes = kPanelBlocks * job.weight->num_tiles * kTileCodes;
    const size_t count = kBlockRows * kPanelN;
    Scratch& scratch = task_scratch();
    scratch.reset(S::room<int16_t>(codes) + S::room<int32_t>(count) + S::room<float>(count) +
                  S::room<void*>(num_taps));
    words = scratch.take<int16_t>(codes);
    sums = scratch.take<int32_t>(count);
    scaled = scratch.take<float>(count);
    taps = scratch.take<const uint8_t*>(num_taps);
  }
};

void expand(const GemmJob& job, const Panel& panel, int16_t* words) {
  const PackedWeight& weight = *job.weight;
  for (size_t b = 0; b < panel.num_blocks; ++b, words += weight.num_tiles * kTileCodes) {
    job.kernels->expand_s16_afp(weight.block(panel.first_block + b), weight.num_tiles,
                                weight.format.bits(), weight.tables.joined, words);
  }
}

// Outputs of an axis whose taps all lie inside.
struct Interior {
  size_t begin = 0, end = 0;

  Interior(const ConvShape& shape, int axis) {
    const size_t stride = shape.strides[axis], pad = shape.pads[axis];
    const size_t reach = (shape.kernel[axis] - 1) * shape.dilations[axis] + 1;
    if (shape.in[axis] + pad < reach) return;
    begin = ceil_div(pad, stride);
    end = std::min(shape.out[axis], (shape.in[axis] + pad - reach) / stride + 1);
  }
  bool has(size_t at) const { return begin <= at && at < end; }
};

// The pixels of a convolution, and where their taps are.
class Pixels {
 public:
  Pixels(const ConvShape& shape, const LhsRows& lhs)
      : shape_(shape), lhs_(lhs), planes_(shape, 0), rows_(shape, 1), columns_(shape, 2) {}

  // Pixel `index`, from channel `channel` on.
  void point_at(size_t index, size_t channel, const uint8_t** taps) const {
    const uint8_t* base = static_cast<const uint8_t*>(lhs_.planes[0]) + channel;
    const uint8_t* padding = static_cast<const uint8_t*>(lhs_.padding[0]);
    const size_t x = index % shape_.out[2], zy = index / shape_.out[2];
    for (size_t kz = 0; kz < shape_.kernel[0]; ++kz) {
      const size_t plane = position(0, zy / shape_.out[1], kz);
      for (size_t ky = 0; ky < shape_.kernel[1]; ++ky) {
        const size_t row = position(1, zy % shape_.out[1], ky);
        for (size_t kx = 0; kx < shape_.kernel[2]; ++kx) {
          const size_t column = position(2, x, kx);
          const bool inside = plane < shape_.in[0] && row < shape_.in[1] && column < shape_.in[2];
          const size_t at = (plane * shape_.in[1] + row) * shape_.in[2] + column;
          *taps++ = inside ? base + at * lhs_.stride : padding;
        }
      }
    }
  }

  // How many pixels from this one on have all taps inside, each `step` bytes behind the one before:
  // 1 where it has not itself.
  size_t run_length(size_t index) const {
    const size_t x = index % shape_.out[2], zy = index / shape_.out[2];
    const bool inside =
        planes_.has(zy / shape_.out[1]) && rows_.has(zy % shape_.out[1]) && columns_.has(x);
    return inside ? columns_.end - x : 1;
  }
  size_t step() const { return shape_.strides[2] * lhs_.stride; }

 private:
  // Beyond the axis in the padding before it, too.
  size_t position(int axis, size_t out, size_t tap) const {
    return out * shape_.strides[axis] + tap * shape_.dilations[axis] - shape_.pads[axis];
  }

  const ConvShape& shape_;
  const LhsRows& lhs_;
  const Interior planes_, rows_, columns_;
};

void run(const GemmJob& job, const ConvShape& shape, const Panel& panel, size_t begin, size_t end) {
  const Workspace work(job, shape.num_taps());
  const Pixels pixels(shape, job.lhs);
  expand(job, panel, work.words);
  const size_t channel = panel.first_block * kTileN;
  for (size_t first = begin; first < end; first += kBlockRows) {
    const size_t count = std::min(kBlockRows, end - first);
    for (size_t i = 0, rows; i < count; i += rows) {
      rows = std::min(pixels.run_length(first + i), count - i);
      pixels.point_at(first + i, channel, work.taps);
      job.kernels->depthwise_s32_u8_s16(work.taps, pixels.step(), shape.num_taps(), work.words,
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

void depthwise(const GemmJob& job, const ConvShape& shape, const Parallel& parallel) {
  const size_t panels = ceil_div(job.n, kPanelN);
  const size_t most = std::max<size_t>(1, kTaskWork / (kPanelN * shape.num_taps()));
  const size_t rows = ceil_div(std::min(job.m, most), kBlockRows) * kBlockRows;
  const size_t splits = ceil_div(job.m, rows);
  parallel_for(parallel, panels * splits, [&](size_t task) {
    const size_t begin = task / panels * rows;
    run(job, shape, panel_of(job, task % panels), begin, std::min(begin + rows, job.m));
  });
}

}  // namespace afpq
