// Convolutions with pixels in the lanes: channel planes go in, channel planes come out, and nothing
// is transposed on the way. Pixels are dwords of 2 or 4 channels; their products with 16 channels
// go to the planes of those.
#pragma once

#include "core/scratch.h"
#include "drivers/conv_paths.h"

namespace afpq {

struct PixelRange {
  size_t begin, end;
};

struct PixelJob {
  const Conv& op;
  const ConvShape& shape;
  const Products products;
  const size_t steps;        // channels of a dword
  const size_t plane_bytes;  // of 16 channels, expanded
  const size_t block_bytes;  // of all planes

  PixelJob(const Conv& conv, const ConvShape& conv_shape, const Products& conv_products);
  bool words() const { return products.elements == Elements::kWords; }
  size_t groups() const { return shape.channels_in / steps; }  // of a tap
  PixelRange channels() const { return {0, shape.channels_in}; }
};

constexpr size_t kPixelDword = 4;
constexpr size_t kPixelLanes = 16;  // kernels.h: of those, what is read is a multiple
constexpr size_t kPixelTasks = 16;  // enough for a few threads

// A sample that is rounded to dwords, and where its outputs go.
struct PixelSample {
  const float* floats;
  const RowQuantizer& quantizer;
  float* dst;
  const float* residual;  // or null
};

// Pixels from `first` on, and where they become dwords, as AfpqPixelSource has it. dst: of the
// first channel of all.
struct PixelRun {
  size_t first, num_rows, row_size;
  size_t row_pitch, stride;
};
void quantize_pixels(const PixelJob& job, const PixelSample& sample, const PixelRun& run,
                     const PixelRange& channels, uint8_t* dst);

// The planes of a block of 16 channels.
void expand_pixel_block(const PixelJob& job, size_t block, uint8_t* dst);

// Rows of pixels, as AfpqPixels has them.
struct PixelRows {
  const uint8_t* lhs;
  const size_t* taps;
  size_t num_taps, stride;
  size_t num_pixels, pitch, size;
  size_t first;  // output
  size_t count;  // of outputs
};

// Rows times an expanded block of channels.
void multiply_pixels(const PixelJob& job, const PixelSample& sample, const PixelRows& rows,
                     size_t block, const uint8_t* rhs);

// The two ways: of 1x1, strips of pixels are rounded to panels; of taps, the sample is rounded to
// planes with padding around them, in which a tap is an offset.
void conv_pixel_panels(const PixelJob& job, const float* src, size_t batch, const ConvTarget& dst,
                       const Parallel& parallel);
void conv_pixel_planes(const PixelJob& job, const float* src, size_t batch, const ConvTarget& dst,
                       const Parallel& parallel);

// Sample i of a batch.
PixelSample pixel_sample(const PixelJob& job, const float* src, const ConvTarget& dst, size_t i,
                         const RowQuantizer& quantizer);

// What a thread has made of a sample for itself.
class OwnSample {
 public:
  // That of this thread, which is empty at the first call of a number.
  static OwnSample& of_call(uint64_t number, size_t bytes);
  static uint64_t next_call();  // a number of its own

  RowQuantizer quantizer;
  bool empty() const { return rows_.begin == rows_.end; }
  uint8_t* made() const { return made_; }

  // make(rows) of those that are needed and not made yet, and of those between.
  template <typename Make>
  void add(const PixelRange& needed, const Make& make) {
    if (empty()) rows_ = {needed.begin, needed.begin};
    if (needed.begin < rows_.begin) make(PixelRange{needed.begin, rows_.begin});
    if (needed.end > rows_.end) make(PixelRange{rows_.end, needed.end});
    rows_ = {std::min(rows_.begin, needed.begin), std::max(rows_.end, needed.end)};
  }

 private:
  uint64_t call_ = 0;
  PixelRange rows_ = {0, 0};
  Scratch memory_;
  uint8_t* made_ = nullptr;
};

// How a sample is multiplied: rows of it are made, in `bytes`, and then tasks need some of them.
struct PixelPlan {
  size_t bytes, rows, tasks;
};

// make(sample, rows, made, parallel); needs(task), a range of rows; products(task, sample, made).
// Each thread makes of a small sample what it needs: to pass it from core to core, and to wait for
// that, takes longer.
template <typename Make, typename Needs, typename Products>
void run_pixel_sample(const PixelJob& job, const PixelPlan& plan, const float* src,
                      const ConvTarget& dst, size_t i, const Parallel& parallel, const Make& make,
                      const Needs& needs, const Products& products) {
  constexpr size_t kSmallSample = size_t{1} << 15;  // elements
  const size_t size = job.shape.channels_in * job.shape.num_in();
  const auto quantizer = [&](const Parallel& of) {
    return sample_quantizer(job.op, job.shape, src + i * size, of);
  };
  if (size > kSmallSample) {
    layer_scratch().reset(Scratch::room<uint8_t>(plan.bytes));
    uint8_t* made = layer_scratch().take<uint8_t>(plan.bytes);
    const RowQuantizer shared = quantizer(parallel);
    const PixelSample sample = pixel_sample(job, src, dst, i, shared);
    make(sample, PixelRange{0, plan.rows}, made, parallel);
    return parallel_for(parallel, plan.tasks, [&](size_t task) { products(task, sample, made); });
  }
  const uint64_t call = OwnSample::next_call();
  parallel_for(parallel, plan.tasks, [&](size_t task) {
    OwnSample& own = OwnSample::of_call(call, plan.bytes);
    if (own.empty()) own.quantizer = quantizer(serial());
    const PixelSample sample = pixel_sample(job, src, dst, i, own.quantizer);
    own.add(needs(task), [&](const PixelRange& rows) { make(sample, rows, own.made(), serial()); });
    products(task, sample, own.made());
  });
}

}  // namespace afpq
