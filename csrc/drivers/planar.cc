// Depthwise and small grouped convolutions on float planes: one output channel at a time, fma over
// its taps.
//
// Output rows are made in strips. The input rows of a strip are copied into scratch that stays in
// L1, with their padding, and cut into phases so that any stride reads contiguous floats. For
// stride 2 and kernel 3 (dilation 1), padded row x0 x1 x2 ...:
//
//   phase 0: x0 x2 x4 ...   tap 0 reads phase 0 from 0, tap 2 reads phase 0 from 1
//   phase 1: x1 x3 x5 ...   tap 1 reads phase 1 from 0
//
// Then output x of every tap lies at one common offset, and all rows of a strip are one call of the
// kernel.
#include <algorithm>

#include "core/scratch.h"
#include "drivers/conv.h"

namespace afpq {
namespace {

constexpr size_t kStripElements = 6144;        // of input rows: 24 KB
constexpr size_t kTaskWork = size_t{1} << 18;  // products that are worth a task

// A strip is `height` output rows (less at the end) at one depth.
struct Strips {
  size_t extent;  // elements of a phase of a row
  size_t row;     // of all phases
  size_t height;
  size_t rows;    // input rows of a strip at one depth
  size_t planes;  // input rows come from so many (channel, tap in depth)
  size_t per_depth;
  size_t count;  // of an output plane
};

Strips strips_of(const ConvShape& shape) {
  const auto reach = [&](int axis) { return (shape.kernel[axis] - 1) * shape.dilations[axis]; };
  Strips strips;
  strips.extent = shape.out[2] + reach(2) / shape.strides[2] + 1;
  strips.row = strips.extent * shape.strides[2];
  strips.planes = shape.group_in() * shape.kernel[0];
  const size_t rows = kStripElements / (strips.row * strips.planes);
  const size_t height = rows > reach(1) ? (rows - reach(1) - 1) / shape.strides[1] + 1 : 1;
  strips.per_depth = ceil_div(shape.out[1], height);
  strips.height = ceil_div(shape.out[1], strips.per_depth);
  strips.rows = (strips.height - 1) * shape.strides[1] + reach(1) + 1;
  strips.count = shape.out[0] * strips.per_depth;
  return strips;
}

// Rows of input into their phases; what lies in the padding of rows is left as it is.
void cut_rows(const AfpqKernels& kernels, const ConvShape& shape, const Strips& strips,
              const float* src, size_t num_rows, float* dst) {
  const size_t step = shape.strides[2], pad = shape.pads[2];
  const size_t limit = std::min(shape.in[2] + pad, strips.row);
  for (size_t phase = 0; phase < step; ++phase) {
    const size_t first = pad <= phase ? phase : phase + ceil_div(pad - phase, step) * step;
    if (first >= limit) continue;
    kernels.pick_f32(src + (first - pad), shape.in[2], step, num_rows,
                     ceil_div(limit - first, step), strips.row,
                     dst + phase * strips.extent + first / step);
  }
}

// The input rows of a strip: dst[planes][rows][row]. src: the planes of a group.
void cut_strip(const AfpqKernels& kernels, const ConvShape& shape, const Strips& strips,
               size_t strip, const float* src, float* dst) {
  const size_t z = strip / strips.per_depth;
  const size_t y = strip % strips.per_depth * strips.height * shape.strides[1];
  // Rows [begin, end) of the strip are rows of the input, the others padding.
  const auto row_of = [&](size_t at) { return std::min(at > y ? at - y : 0, strips.rows); };
  const size_t begin = row_of(shape.pads[1]), end = row_of(shape.pads[1] + shape.in[1]);
  for (size_t plane = 0; plane < strips.planes; ++plane, dst += strips.rows * strips.row) {
    const size_t c = plane / shape.kernel[0], kz = plane % shape.kernel[0];
    const size_t at_z = z * shape.strides[0] + kz * shape.dilations[0];  // with padding
    if (at_z < shape.pads[0] || at_z - shape.pads[0] >= shape.in[0] || begin == end) {
      std::fill(dst, dst + strips.rows * strips.row, 0.0f);
      continue;
    }
    const size_t depth = c * shape.in[0] + at_z - shape.pads[0];
    const size_t first = depth * shape.in[1] + y + begin - shape.pads[1];
    std::fill(dst, dst + begin * strips.row, 0.0f);
    cut_rows(kernels, shape, strips, src + first * shape.in[2], end - begin,
             dst + begin * strips.row);
    std::fill(dst + end * strips.row, dst + strips.rows * strips.row, 0.0f);
  }
}

struct Workspace {
  float* rows;         // [planes][rows][row], zero in the padding at the ends of rows
  const float** taps;  // [k] where they start in `rows`
  float* weights;      // [group_out][k]
};

Workspace make_workspace(const ConvShape& shape, const Strips& strips, size_t k) {
  using S = Scratch;
  const size_t size = strips.planes * strips.rows * strips.row;
  Scratch& scratch = task_scratch();
  scratch.reset(S::room<float>(size) + S::room<float*>(k) + S::room<float>(shape.group_out() * k));
  Workspace work;
  work.rows = scratch.take<float>(size);
  work.taps = scratch.take<const float*>(k);
  work.weights = scratch.take<float>(shape.group_out() * k);
  std::fill(work.rows, work.rows + size, 0.0f);
  // Stored order: k = tap * channels_per_group + channel.
  const float** tap = work.taps;
  for (size_t z = 0; z < shape.kernel[0]; ++z) {
    for (size_t y = 0; y < shape.kernel[1]; ++y) {
      for (size_t x = 0; x < shape.kernel[2]; ++x) {
        const size_t at = x * shape.dilations[2];
        const size_t place = at % shape.strides[2] * strips.extent + at / shape.strides[2];
        for (size_t c = 0; c < shape.group_in(); ++c) {
          const size_t plane = c * shape.kernel[0] + z;
          *tap++ = work.rows + (plane * strips.rows + y * shape.dilations[1]) * strips.row + place;
        }
      }
    }
  }
  return work;
}

void decode_group(const PackedWeight& weight, size_t first, size_t count, float* dst) {
  for (size_t channel = first; channel < first + count; ++channel) {
    for (size_t i = 0; i < weight.k; ++i) *dst++ = weight.tables.value[weight.code(channel, i)];
  }
}

// All output channels of a group, rows of one strip. dst: the planes of the group.
void run_strip(const Conv& op, const ConvShape& shape, const Strips& strips, size_t strip,
               size_t group, const Workspace& work, float* dst) {
  const PackedWeight& weight = *op.weight;
  const size_t z = strip / strips.per_depth, y = strip % strips.per_depth * strips.height;
  AfpqPlanar planar = {};
  planar.taps = work.taps;
  planar.num_taps = weight.k;
  planar.num_rows = std::min(strips.height, shape.out[1] - y);
  planar.row_size = shape.out[2];
  planar.src_stride = strips.row * shape.strides[1];
  planar.dst_stride = shape.out[2];
  planar.low = op.low;
  planar.high = op.high;
  for (size_t c = 0; c < shape.group_out(); ++c) {
    const size_t channel = group * shape.group_out() + c;
    planar.weights = work.weights + c * weight.k;
    planar.scale = weight.scales[channel];
    planar.bias = op.bias ? op.bias[channel] : 0.0f;
    planar.dst = dst + c * shape.num_out() + (z * shape.out[1] + y) * shape.out[2];
    op.kernels->planar_f32(&planar);
  }
}

}  // namespace

void conv_planar(const Conv& op, const ConvShape& shape, const float* src, size_t batch, float* dst,
                 const Parallel& parallel) {
  const Strips strips = strips_of(shape);
  const size_t total = batch * shape.groups * strips.count;
  const size_t work_of_one = strips.height * shape.out[2] * op.weight->k * shape.group_out();
  const size_t step = std::max<size_t>(1, std::min(ceil_div(total, 8), kTaskWork / work_of_one));
  parallel_for(parallel, ceil_div(total, step), [&](size_t task) {
    const Workspace work = make_workspace(shape, strips, op.weight->k);
    size_t decoded = shape.groups;  // none
    for (size_t i = task * step; i < std::min(total, (task + 1) * step); ++i) {
      const size_t item = i / strips.count, strip = i % strips.count, group = item % shape.groups;
      if (group != decoded) {
        decode_group(*op.weight, group * shape.group_out(), shape.group_out(), work.weights);
        decoded = group;
      }
      cut_strip(*op.kernels, shape, strips, strip, src + item * shape.group_in() * shape.num_in(),
                work.rows);
      run_strip(op, shape, strips, strip, group, work,
                dst + item * shape.group_out() * shape.num_out());
    }
  });
}

}  // namespace afpq
