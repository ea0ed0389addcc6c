// 1x1 convolutions with pixels in the lanes. Small samples are shared out as in `run_small_sample`;
// of others:
//
//   many strips: for each strip of pixels: round it to a panel, multiply that by all blocks of 16
//                channels, which are expanded before                                     parallel
//   few strips:  round all strips, then for each chunk of blocks: expand, multiply       parallel
//
// A panel is as wide as stays in L1, and wide enough for outputs to be written in long runs.
#include <algorithm>

#include "core/scratch.h"
#include "drivers/pixels.h"

namespace afpq {
namespace {

constexpr size_t kPanelBytes = size_t{128} << 10;
constexpr size_t kLeastPanelPixels = 64;
constexpr size_t kExpandedBytes = size_t{128} << 10;  // of a chunk, in L2
constexpr size_t kManyStrips = 4;                     // enough for a few threads
constexpr size_t kMakeTasks = 8;                      // the same, of few strips
constexpr size_t kMakeElements = size_t{1} << 13;     // that are worth one

struct Panels {
  const PixelJob& job;
  const size_t total;  // pixels
  size_t pixels;       // of a strip, less at the end
  size_t num_rows;     // strips
  size_t stride;       // pixels of a row of a panel: odd lines, so that a column spreads over L1
  size_t bytes;        // of a panel

  explicit Panels(const PixelJob& pixel_job) : job(pixel_job), total(job.shape.num_out()) {
    const size_t most =
        std::clamp<size_t>(kPanelBytes / (job.op.weight->k * job.products.element_bytes()),
                           kLeastPanelPixels, kMostPixels);
    size_t count = ceil_div(total, most);
    if (count > 1 || !job.has_pairs()) count += count % 2;  // for as many threads
    pixels = ceil_div(ceil_div(total, count), kPixelLanes) * kPixelLanes;
    num_rows = ceil_div(total, pixels);
    stride = (pixels / kPixelLanes | 1) * kPixelLanes;
    bytes = job.groups() * stride * kPixelDword;
  }
  size_t pixels_of(size_t strip) const { return std::min(pixels, total - strip * pixels); }

  void make_panel(const PixelSample& sample, size_t strip, const PixelRange& channels,
                  uint8_t* panel) const {
    const size_t count = pixels_of(strip);
    quantize_pixels(job, sample, {strip * pixels, 1, count, count, stride}, channels, panel);
  }
  void multiply_panel(const PixelSample& sample, const uint8_t* panel, size_t strip,
                      const PixelRange& channels, const uint8_t* rhs) const {
    static constexpr size_t kTap = 0;
    const size_t count = pixels_of(strip);
    multiply_pixels(job, sample,
                    {panel, &kTap, 1, stride, count, count, count, strip * pixels, count}, channels,
                    rhs);
  }

  // As Way.
  PassedPanels panels() const { return {job, num_rows, stride * kPixelDword}; }
  void make(const PixelSample& sample, const PixelRange& channels, uint8_t* made) const {
    for (size_t strip = 0; strip < num_rows; ++strip)
      make_panel(sample, strip, channels, made + strip * bytes);
  }
  void multiply(const PixelSample& sample, const uint8_t* made, const PixelRange& strips,
                const PixelRange& channels, const uint8_t* rhs) const {
    for (size_t strip = strips.begin; strip < strips.end; ++strip)
      multiply_panel(sample, made + strip * bytes, strip, channels, rhs);
  }
};

void expand_all(const PixelJob& job, uint8_t* dst, const Parallel& parallel) {
  const size_t blocks = job.op.weight->num_blocks;
  const size_t step = std::max<size_t>(1, kExpandedBytes / job.block_bytes);
  parallel_for(parallel, ceil_div(blocks, step), [&](size_t task) {
    for (size_t b = task * step; b < std::min(blocks, (task + 1) * step); ++b)
      expand_pixel_block(job, b, dst + b * job.block_bytes);
  });
}

void run_many_strips(const PixelJob& job, const Panels& panels, const PixelSample& sample,
                     const uint8_t* expanded, const Parallel& parallel) {
  parallel_for(parallel, panels.num_rows, [&](size_t strip) {
    task_scratch().reset(Scratch::room<uint8_t>(panels.bytes));
    uint8_t* panel = task_scratch().take<uint8_t>(panels.bytes);
    panels.make_panel(sample, strip, job.channels(), panel);
    for (size_t b = 0; b < job.op.weight->num_blocks; ++b)
      panels.multiply_panel(sample, panel, strip, job.outputs(b), expanded + b * job.block_bytes);
  });
}

void conv_many_strips(const PixelJob& job, const Panels& panels, const float* src, size_t batch,
                      const ConvTarget& dst, const Parallel& parallel) {
  const size_t bytes = job.op.weight->num_blocks * job.block_bytes;
  layer_scratch().reset(Scratch::room<uint8_t>(bytes));
  uint8_t* expanded = layer_scratch().take<uint8_t>(bytes);
  expand_all(job, expanded, parallel);
  for (size_t i = 0; i < batch; ++i) {
    const float* floats = src + i * job.shape.channels_in * job.shape.num_in();
    const RowQuantizer quantizer = sample_quantizer(job.op, job.shape, floats, parallel);
    run_many_strips(job, panels, pixel_sample(job, src, dst, i, quantizer), expanded, parallel);
  }
}

void conv_few_strips(const PixelJob& job, const Panels& panels, const float* src, size_t batch,
                     const ConvTarget& dst, const Parallel& parallel) {
  const size_t blocks = job.op.weight->num_blocks;
  const size_t step = std::max<size_t>(
      1, std::min(ceil_div(blocks, kPixelTasks), kExpandedBytes / job.block_bytes));
  // Channels next to each other go to one core, which has often made them itself.
  const size_t channels = job.shape.channels_in;
  const size_t least = std::max(ceil_div(channels, kMakeTasks), kMakeElements / panels.total);
  const size_t chunk = ceil_div(std::max<size_t>(1, least), kTileK) * kTileK;
  layer_scratch().reset(Scratch::room<uint8_t>(panels.num_rows * panels.bytes));
  uint8_t* made = layer_scratch().take<uint8_t>(panels.num_rows * panels.bytes);
  for (size_t i = 0; i < batch; ++i) {
    const float* floats = src + i * channels * job.shape.num_in();
    const RowQuantizer quantizer = sample_quantizer(job.op, job.shape, floats, parallel);
    const PixelSample sample = pixel_sample(job, src, dst, i, quantizer);
    parallel_for(parallel, ceil_div(channels, chunk) * panels.num_rows, [&](size_t task) {
      const size_t first = task / panels.num_rows * chunk, strip = task % panels.num_rows;
      panels.make_panel(sample, strip, {first, std::min(channels, first + chunk)},
                        made + strip * panels.bytes);
    });
    parallel_for(parallel, ceil_div(blocks, step), [&](size_t task) {
      task_scratch().reset(Scratch::room<uint8_t>(job.block_bytes));
      uint8_t* expanded = task_scratch().take<uint8_t>(job.block_bytes);
      for (size_t b = task * step; b < std::min(blocks, (task + 1) * step); ++b) {
        expand_pixel_block(job, b, expanded);
        panels.multiply(sample, made, {0, panels.num_rows}, job.outputs(b), expanded);
      }
    });
  }
}

}  // namespace

void conv_pixel_panels(const PixelJob& job, const float* src, size_t batch, const ConvTarget& dst,
                       const Parallel& parallel) {
  const Panels panels(job);
  if (is_small(job)) {
    for (size_t i = 0; i < batch; ++i) run_small_sample(job, panels, src, dst, i, parallel);
    return;
  }
  (panels.num_rows >= kManyStrips ? conv_many_strips : conv_few_strips)(job, panels, src, batch,
                                                                        dst, parallel);
}

}  // namespace afpq
