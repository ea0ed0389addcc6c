// Convolutions with pixels in the lanes: channel planes go in, channel planes come out, and nothing
// is transposed on the way. Pixels are dwords of 2 or 4 channels; their products with 16 channels
// go to the planes of those.
#pragma once

#include "core/scratch.h"
#include "core/together.h"
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
  size_t groups() const { return shape.channels_in / steps; }                           // of a tap
  bool has_pairs() const { return ceil_div(shape.channels_out, kTileN / 2) % 2 == 0; }  // of 8
  PixelRange channels() const { return {0, shape.channels_in}; }
  PixelRange outputs(size_t block) const {
    return {block * kTileN, std::min<size_t>(shape.channels_out, (block + 1) * kTileN)};
  }
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

// Rows times channels of one block, which is expanded.
void multiply_pixels(const PixelJob& job, const PixelSample& sample, const PixelRows& rows,
                     const PixelRange& channels, const uint8_t* rhs);

// The two ways: of 1x1, strips of pixels are rounded to panels; of taps, the sample is rounded to
// planes with padding around them, in which a tap is an offset.
void conv_pixel_panels(const PixelJob& job, const float* src, size_t batch, const ConvTarget& dst,
                       const Parallel& parallel);
void conv_pixel_planes(const PixelJob& job, const float* src, size_t batch, const ConvTarget& dst,
                       const Parallel& parallel);

// Sample i of a batch.
PixelSample pixel_sample(const PixelJob& job, const float* src, const ConvTarget& dst, size_t i,
                         const RowQuantizer& quantizer);

// Channels of panels of dwords, [num_panels][groups][group_bytes], to and from what threads pass to
// each other. Whoever receives a line writes to it, too: one that only this core has then costs
// less to write the next time than one that several have.
struct PassedPanels {
  const PixelJob& job;
  size_t num_panels, group_bytes;

  size_t bytes() const { return num_panels * job.groups() * group_bytes; }
  void pass(const uint8_t* made, const PixelRange& channels, uint8_t* passed) const;
  void receive(uint8_t* passed, const PixelRange& channels, uint8_t* made) const;
};

// Whether a sample is small enough to be passed from thread to thread.
inline bool is_small(const PixelJob& job) {
  constexpr size_t kMostElements = size_t{1} << 15;
  return job.shape.channels_in * job.shape.num_in() <= kMostElements;
}

// A sample of which each thread rounds some channels, passes them to the others, and makes some
// channels of output: planes are read and written whole. Of parts of planes, cores would ask ahead
// for lines of each other. The two ways, as Way:
//   panels()                                           as they are passed on
//   num_rows                                           of output, or strips of pixels
//   make(sample, channels, made)                       pixels to dwords
//   multiply(sample, made, rows, channels, expanded)   of a block
template <typename Way>
void run_small_sample(const PixelJob& job, const Way& way, const float* src, const ConvTarget& dst,
                      size_t i, const Parallel& parallel) {
  constexpr size_t kUnit = kTileN / 2;            // channels of output
  constexpr size_t kLeastWork = size_t{1} << 18;  // products that are worth a thread
  const ConvShape& shape = job.shape;
  const size_t quads = shape.channels_in / kTileK, units = ceil_div(shape.channels_out, kUnit);
  const size_t work = shape.num_out() * shape.channels_out * job.op.weight->k;
  const size_t most = std::min({quads, units, std::max<size_t>(2, work / kLeastWork)});
  const PassedPanels panels = way.panels();
  const size_t rows = way.num_rows, bytes = panels.bytes();
  const float* floats = src + i * shape.channels_in * shape.num_in();
  layer_scratch().reset(Scratch::room<uint8_t>(bytes));
  uint8_t* passed = layer_scratch().take<uint8_t>(bytes);
  AfpqRange ranges[Share::kMost] = {};
  const auto channels = [&](const Share& share) {
    return PixelRange{share.begin(quads) * kTileK, share.end(quads) * kTileK};
  };
  const auto quantizer = [&] {
    return row_quantizer(job.op.rounding, widest(ranges, Share::kMost));
  };
  // Of a thread: what it has made stays until it is used.
  const auto own = [&] {
    strip_scratch().reset(Scratch::room<uint8_t>(bytes));
    return strip_scratch().take<uint8_t>(bytes);
  };
  const auto look = [&](const Share& share) {
    const PixelRange of = channels(share);
    job.op.kernels->range_f32(floats + of.begin * shape.num_in(),
                              (of.end - of.begin) * shape.num_in(), &ranges[share.index]);
  };
  const auto make = [&](const Share& share, bool alone) {
    const RowQuantizer rounding = quantizer();
    uint8_t* made = own();
    way.make(pixel_sample(job, src, dst, i, rounding), channels(share), made);
    if (!alone) panels.pass(made, channels(share), passed);
  };
  const auto receive = [&](const Share& share) { panels.receive(passed, channels(share), own()); };
  const auto use = [&](const Share& share) {
    const RowQuantizer rounding = quantizer();
    const PixelSample sample = pixel_sample(job, src, dst, i, rounding);
    const uint8_t* made = own();
    task_scratch().reset(Scratch::room<uint8_t>(job.block_bytes));
    uint8_t* expanded = task_scratch().take<uint8_t>(job.block_bytes);
    // Where units do not come out even, the rows of some are shared.
    const size_t begin = share.begin(units * rows), end = share.end(units * rows);
    size_t block = ~size_t{0};
    for (size_t unit = begin / rows; unit * rows < end;) {
      const size_t first = std::max(begin, unit * rows) - unit * rows;
      const size_t last = std::min(end - unit * rows, rows);
      if (block != unit * kUnit / kTileN) {
        block = unit * kUnit / kTileN;
        expand_pixel_block(job, block, expanded);
      }
      // Both units of a block together, if all of them is to be made.
      const bool both = unit % 2 == 0 && first == 0 && (unit + 2) * rows <= end;
      const size_t next = unit + (both ? 2 : 1);
      way.multiply(sample, made, {first, last},
                   {unit * kUnit, std::min(shape.channels_out, next * kUnit)}, expanded);
      unit = next;
    }
  };
  run_together(parallel, most, look, make, receive, use);
}

}  // namespace afpq
