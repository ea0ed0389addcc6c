// Convolutions of taps with pixels in the lanes. Small samples are shared out as in
// `run_small_sample`; of others:
//
//   the sample is rounded to planes of dwords with padding around them     parallel over rows
//   for each chunk of blocks of 16 channels and of rows: expand, multiply            parallel
//
// In a plane, a tap is an offset: output x of a row that begins at p reads tap t at p + x + t. So
// the rows of a plane are one run of pixels, and those between two rows of output are computed and
// not written. Where steps between outputs are longer than 1, a plane has the pixels that are so
// many apart, and there are as many planes.
#include <algorithm>
#include <cstring>
#include <vector>

#include "core/scratch.h"
#include "drivers/pixels.h"

namespace afpq {
namespace {

constexpr size_t kTaskElements = size_t{1} << 14;
constexpr size_t kLeastTaskPixels = 256;  // for a block to be worth its expansion

// One axis: which remainders of positions, padding included, by the stride are read.
struct Phases {
  size_t stride;
  std::vector<size_t> used;

  Phases(const ConvShape& shape, int axis) : stride(shape.strides[axis]) {
    for (size_t k = 0; k < shape.kernel[axis]; ++k) {
      const size_t phase = k * shape.dilations[axis] % stride;
      if (std::find(used.begin(), used.end(), phase) == used.end()) used.push_back(phase);
    }
  }
  size_t index(size_t position) const {
    return static_cast<size_t>(std::find(used.begin(), used.end(), position % stride) -
                               used.begin());
  }
};

struct Planes {
  Phases y, x;
  size_t rows;    // of a plane
  size_t pitch;   // pixels from row to row
  size_t pixels;  // of a plane: odd lines, so that a column of groups spreads over L1
  size_t stride;  // from group to group: all planes of one
  std::vector<size_t> taps;

  explicit Planes(const ConvShape& shape) : y(shape, 1), x(shape, 2) {
    const size_t reached = shape.num_reached(2), left = shape.pads[2];
    rows = ceil_div(shape.num_reached(1), y.stride);
    if (x.stride == 1) {
      // The padding behind a row is that before the next.
      const size_t right = reached > left + shape.in[2] ? reached - left - shape.in[2] : 0;
      pitch = std::max(shape.out[2], shape.in[2] + std::max(left, right));
    } else {
      pitch = ceil_div(reached, x.stride);
    }
    // Behind the last row: its padding, and what fills a vector.
    const size_t all = rows * pitch + left + kPixelLanes;
    pixels = (ceil_div(all, kPixelLanes) | 1) * kPixelLanes;
    stride = y.used.size() * x.used.size() * pixels;
    taps.reserve(shape.num_taps());
    for (size_t ky = 0; ky < shape.kernel[1]; ++ky) {
      for (size_t kx = 0; kx < shape.kernel[2]; ++kx) {
        const size_t row = ky * shape.dilations[1], column = kx * shape.dilations[2];
        taps.push_back(plane(y.index(row), x.index(column)) + row / y.stride * pitch +
                       column / x.stride);
      }
    }
  }
  size_t plane(size_t phase_y, size_t phase_x) const {
    return (phase_y * x.used.size() + phase_x) * pixels;
  }
};

// The positions of a phase, of which number i is i * stride + phase, that lie in [begin, end).
struct Inside {
  size_t begin, end;
  Inside(size_t phase, size_t stride, size_t from, size_t to)
      : begin(from > phase ? ceil_div(from - phase, stride) : 0),
        end(to > phase ? ceil_div(to - phase, stride) : 0) {}
};

// Rows [begin, end) of all planes, of stride 1: pixels are rounded to where they belong. dst:
// [groups][planes.stride] dwords.
void round_rows(const PixelJob& job, const Planes& planes, const PixelSample& sample,
                uint32_t padding, size_t begin, size_t end, const PixelRange& channels,
                uint32_t* dst) {
  const ConvShape& shape = job.shape;
  const size_t top = shape.pads[1], left = shape.pads[2], width = shape.in[2];
  const size_t first = std::clamp(begin, top, top + shape.in[1]);
  const size_t last = std::clamp(end, first, top + shape.in[1]);
  const size_t filled = end < planes.rows ? end * planes.pitch : planes.pixels;
  for (size_t g = channels.begin / job.steps; g < channels.end / job.steps; ++g) {
    fill_around_rows(dst + g * planes.stride, begin * planes.pitch, filled, first, last,
                     planes.pitch, left, width, padding);
  }
  const PixelRun run = {(first - top) * width, last - first, width, planes.pitch, planes.stride};
  quantize_pixels(job, sample, run, channels,
                  reinterpret_cast<uint8_t*>(dst + first * planes.pitch + left));
}

// Rows [begin, end) of all planes. dst: [groups][planes.stride] dwords, as floats because the
// kernel moves floats.
void fill_rows(const PixelJob& job, const Planes& planes, const PixelSample& sample, float padding,
               size_t begin, size_t end, const PixelRange& channels, float* dst) {
  const ConvShape& shape = job.shape;
  // The rows of input that they hold, one behind the other.
  const size_t top = shape.pads[1], bottom = top + shape.in[1];
  const size_t first = std::clamp(begin * planes.y.stride, top, bottom);
  const size_t last = std::clamp(end * planes.y.stride, top, bottom);
  const size_t count = (last - first) * shape.in[2];
  const size_t bytes = job.groups() * count * kPixelDword;
  task_scratch().reset(Scratch::room<uint8_t>(bytes));
  uint8_t* rounded = task_scratch().take<uint8_t>(bytes);
  if (count > 0)
    quantize_pixels(job, sample, {(first - top) * shape.in[2], 1, count, count, count}, channels,
                    rounded);
  const size_t filled = end < planes.rows ? end * planes.pitch : planes.pixels;
  const size_t last_group = channels.end / job.steps;
  for (size_t g = channels.begin / job.steps; g < last_group; ++g) {
    float* group = dst + g * planes.stride;
    const float* src = reinterpret_cast<const float*>(rounded) + g * count;
    for (size_t py = 0; py < planes.y.used.size(); ++py) {
      const Inside y(planes.y.used[py], planes.y.stride, first, last);
      for (size_t px = 0; px < planes.x.used.size(); ++px) {
        const size_t phase = planes.x.used[px], left = shape.pads[2];
        float* plane = group + planes.plane(py, px);
        std::fill(plane + begin * planes.pitch, plane + filled, padding);
        const size_t right = planes.x.stride == 1
                                 ? left + shape.in[2]
                                 : std::min(left + shape.in[2], shape.num_reached(2));
        const Inside x(phase, planes.x.stride, left, right);
        if (y.begin >= y.end || x.begin >= x.end) continue;
        const size_t row = y.begin * planes.y.stride + planes.y.used[py] - first;
        const size_t column = x.begin * planes.x.stride + phase - left;
        job.op.kernels->pick_f32(src + row * shape.in[2] + column, planes.y.stride * shape.in[2],
                                 planes.x.stride, y.end - y.begin, x.end - x.begin, planes.pitch,
                                 plane + y.begin * planes.pitch + x.begin);
      }
    }
  }
}

void make_planes(const PixelJob& job, const Planes& planes, const PixelSample& sample,
                 const PixelRange& channels, uint8_t* made, const Parallel& parallel) {
  const int32_t zero = sample.quantizer.zero_element(job.products.elements);
  const uint32_t dword = job.words() ? static_cast<uint32_t>(zero & 0xffff) * 0x10001u
                                     : static_cast<uint32_t>(zero & 0xff) * 0x1010101u;
  float padding;
  std::memcpy(&padding, &dword, sizeof(padding));
  const size_t row = planes.y.stride * job.shape.in[2] * job.shape.channels_in;
  const size_t step = std::max<size_t>(1, kTaskElements / std::max<size_t>(1, row));
  const bool in_place = planes.y.stride == 1 && planes.x.stride == 1;
  parallel_for(parallel, ceil_div(planes.rows, step), [&](size_t task) {
    const size_t begin = task * step, end = std::min(planes.rows, begin + step);
    if (in_place) {
      round_rows(job, planes, sample, dword, begin, end, channels,
                 reinterpret_cast<uint32_t*>(made));
    } else {
      fill_rows(job, planes, sample, padding, begin, end, channels, reinterpret_cast<float*>(made));
    }
  });
}

// Rows [begin, end) of output times a block.
void multiply_rows(const PixelJob& job, const Planes& planes, const PixelSample& sample,
                   const uint8_t* made, size_t begin, size_t end, const PixelRange& channels,
                   const uint8_t* rhs) {
  const size_t width = job.shape.out[2];
  const size_t step = (kMostPixels - width) / planes.pitch + 1;
  for (size_t y = begin; y < end; y += step) {
    const size_t count = std::min(step, end - y);
    const PixelRows rows = {made + y * planes.pitch * kPixelDword,
                            planes.taps.data(),
                            planes.taps.size(),
                            planes.stride,
                            (count - 1) * planes.pitch + width,
                            planes.pitch,
                            width,
                            y * width,
                            count * width};
    multiply_pixels(job, sample, rows, channels, rhs);
  }
}

// As Way.
struct PlaneWay {
  const PixelJob& job;
  const Planes& planes;
  const size_t num_rows = job.shape.out[1];

  PassedPanels panels() const { return {job, 1, planes.stride * kPixelDword}; }

  void make(const PixelSample& sample, const PixelRange& channels, uint8_t* made) const {
    make_planes(job, planes, sample, channels, made, serial());
  }
  void multiply(const PixelSample& sample, const uint8_t* made, const PixelRange& rows,
                const PixelRange& channels, const uint8_t* rhs) const {
    multiply_rows(job, planes, sample, made, rows.begin, rows.end, channels, rhs);
  }
};

}  // namespace

void conv_pixel_planes(const PixelJob& job, const float* src, size_t batch, const ConvTarget& dst,
                       const Parallel& parallel) {
  const ConvShape& shape = job.shape;
  const Planes planes(shape);
  if (is_small(job)) {
    const PlaneWay way = {job, planes};
    for (size_t i = 0; i < batch; ++i) run_small_sample(job, way, src, dst, i, parallel);
    return;
  }
  const size_t blocks = job.op.weight->num_blocks, step = ceil_div(blocks, kPixelTasks);
  const size_t chunks = ceil_div(blocks, step);
  size_t parts =
      std::clamp<size_t>(shape.num_out() / kLeastTaskPixels, 1, ceil_div(kPixelTasks, chunks));
  if (parts > 1 && chunks % 2) parts += parts % 2;  // for two threads
  const size_t rows = ceil_div(shape.out[1], parts);
  const size_t bytes = job.groups() * planes.stride * kPixelDword;
  layer_scratch().reset(Scratch::room<uint8_t>(bytes));
  uint8_t* made = layer_scratch().take<uint8_t>(bytes);
  for (size_t i = 0; i < batch; ++i) {
    const float* floats = src + i * shape.channels_in * shape.num_in();
    const RowQuantizer quantizer = sample_quantizer(job.op, shape, floats, parallel);
    const PixelSample sample = pixel_sample(job, src, dst, i, quantizer);
    make_planes(job, planes, sample, job.channels(), made, parallel);
    // Tasks next to each other share rows of input, and make rows next to each other of what the
    // next layer reads.
    parallel_for(parallel, chunks * parts, [&](size_t task) {
      const size_t begin = std::min(shape.out[1], task / chunks * rows);
      const size_t end = std::min(shape.out[1], begin + rows), chunk = task % chunks * step;
      task_scratch().reset(Scratch::room<uint8_t>(job.block_bytes));
      uint8_t* expanded = task_scratch().take<uint8_t>(job.block_bytes);
      for (size_t b = chunk; b < std::min(blocks, chunk + step) && begin < end; ++b) {
        expand_pixel_block(job, b, expanded);
        multiply_rows(job, planes, sample, made, begin, end, job.outputs(b), expanded);
      }
    });
  }
}

}  // namespace afpq
