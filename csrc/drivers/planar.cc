// Depthwise and small grouped convolutions on float planes: one output channel at a time, fma over its taps.
//
// A plane is copied once into padded scratch, cut into phases so that any stride reads contiguous floats. For one axis
// with stride 2 and kernel 3 (dilation 1), padded input x0 x1 x2 ...:
//
//   phase 0: x0 x2 x4 ...   tap 0 reads phase 0 from 0, tap 2 reads phase 0 from 1
//   phase 1: x1 x3 x5 ...   tap 1 reads phase 1 from 0
//
// All three axes are cut so; then output (z, y, x) of every tap lies at one common offset, and a whole plane of outputs
// (with some columns to drop at the end of each row) is one call of the kernel.
#include <algorithm>

#include "core/scratch.h"
#include "drivers/conv.h"

namespace afpq {
namespace {

struct Phases {
  size_t count[3];    // strides
  size_t extent[3];   // of one phase, per axis
  size_t plane;       // elements of one phase
  size_t num_phases;
};

Phases phases_of(const ConvShape& shape) {
  Phases phases;
  for (int axis = 0; axis < 3; ++axis) {
    phases.count[axis] = shape.strides[axis];
    const size_t reach = (shape.kernel[axis] - 1) * shape.dilations[axis] / shape.strides[axis];
    phases.extent[axis] = shape.out[axis] + reach + 1;
  }
  phases.plane = phases.extent[0] * phases.extent[1] * phases.extent[2];
  phases.num_phases = phases.count[0] * phases.count[1] * phases.count[2];
  return phases;
}

// Where tap (kz, ky, kx) starts in the phases of a plane.
size_t tap_start(const ConvShape& shape, const Phases& phases, const size_t* tap) {
  size_t phase = 0, place = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const size_t at = tap[axis] * shape.dilations[axis];
    phase = phase * phases.count[axis] + at % phases.count[axis];
    place = place * phases.extent[axis] + at / phases.count[axis];
  }
  return phase * phases.plane + place;
}

// One row of input, at padded position (z, y), into its phases.
void cut_row(const ConvShape& shape, const Phases& phases, const float* row, size_t z, size_t y, float* dst) {
  const size_t sz = phases.count[0], sy = phases.count[1], sx = phases.count[2];
  if (z / sz >= phases.extent[0] || y / sy >= phases.extent[1]) return;
  float* base = dst + ((z % sz * sy + y % sy) * sx) * phases.plane +
                (z / sz * phases.extent[1] + y / sy) * phases.extent[2];
  const size_t pad = shape.pads[2], limit = std::min(shape.in[2] + pad, phases.extent[2] * sx);
  if (sx == 1) {
    if (limit > pad) std::copy(row, row + (limit - pad), base + pad);
    return;
  }
  for (size_t phase = 0; phase < sx; ++phase) {
    float* line = base + phase * phases.plane;
    const size_t first = pad <= phase ? phase : phase + ceil_div(pad - phase, sx) * sx;
    for (size_t x = first; x < limit; x += sx) line[x / sx] = row[x - pad];
  }
}

void cut_plane(const ConvShape& shape, const Phases& phases, const float* src, float* dst) {
  for (size_t z = 0; z < shape.in[0]; ++z) {
    for (size_t y = 0; y < shape.in[1]; ++y) {
      cut_row(shape, phases, src, z + shape.pads[0], y + shape.pads[1], dst);
      src += shape.in[2];
    }
  }
}

struct Workspace {
  float* phases;        // [group_in][num_phases][plane], zero wherever no input lands
  float* line;          // outputs of a plane with the columns to drop
  const float** taps;   // [k]
  float* weights;       // [k]
};

Workspace make_workspace(const ConvShape& shape, const Phases& phases, size_t k) {
  const size_t size = shape.group_in() * phases.num_phases * phases.plane;
  Scratch& scratch = task_scratch();
  using S = Scratch;
  scratch.reset(S::room<float>(size) + S::room<float>(phases.plane) + S::room<float*>(k) + S::room<float>(k));
  Workspace work;
  work.phases = scratch.take<float>(size);
  work.line = scratch.take<float>(phases.plane);
  work.taps = scratch.take<const float*>(k);
  work.weights = scratch.take<float>(k);
  std::fill(work.phases, work.phases + size, 0.0f);
  // Stored order: k = tap * channels_per_group + channel.
  const float** tap = work.taps;
  for (size_t z = 0; z < shape.kernel[0]; ++z) {
    for (size_t y = 0; y < shape.kernel[1]; ++y) {
      for (size_t x = 0; x < shape.kernel[2]; ++x) {
        const size_t at[3] = {z, y, x};
        for (size_t c = 0; c < shape.group_in(); ++c) {
          *tap++ = work.phases + c * phases.num_phases * phases.plane + tap_start(shape, phases, at);
        }
      }
    }
  }
  return work;
}

void run_channel(const Conv& op, const ConvShape& shape, const Phases& phases, size_t channel, const Workspace& work,
                 float* dst) {
  const PackedWeight& weight = *op.weight;
  for (size_t i = 0; i < weight.k; ++i) work.weights[i] = weight.tables.value[weight.code(channel, i)];
  const float scale = weight.scales[channel], bias = op.bias ? op.bias[channel] : 0.0f;
  const size_t row = phases.extent[2], rows = phases.extent[1];
  for (size_t z = 0; z < shape.out[0]; ++z) {
    // The last row ends with its last output, so no read goes past the last phase.
    const size_t count = (shape.out[1] - 1) * row + shape.out[2];
    op.kernels->planar_f32(work.taps, work.weights, weight.k, count, scale, bias, op.low, op.high, work.line);
    for (size_t y = 0; y < shape.out[1]; ++y, dst += shape.out[2]) {
      std::copy(work.line + y * row, work.line + y * row + shape.out[2], dst);
    }
    for (size_t i = 0; i < weight.k; ++i) work.taps[i] += rows * row;
  }
  for (size_t i = 0; i < weight.k; ++i) work.taps[i] -= shape.out[0] * rows * row;
}

}  // namespace

void conv_planar(const Conv& op, const ConvShape& shape, const float* src, size_t batch, float* dst,
                 const Parallel& parallel) {
  const Phases phases = phases_of(shape);
  const size_t total = batch * shape.groups;
  const size_t step = std::max<size_t>(1, std::min(ceil_div(total, 8), (size_t{1} << 18) / (phases.plane * op.weight->k)));
  parallel_for(parallel, ceil_div(total, step), [&](size_t task) {
    const Workspace work = make_workspace(shape, phases, op.weight->k);
    for (size_t i = task * step; i < std::min(total, (task + 1) * step); ++i) {
      const size_t sample = i / shape.groups, group = i % shape.groups;
      for (size_t c = 0; c < shape.group_in(); ++c) {
        const float* plane = src + (sample * shape.channels_in + group * shape.group_in() + c) * shape.num_in();
        cut_plane(shape, phases, plane, work.phases + c * phases.num_phases * phases.plane);
      }
      for (size_t c = 0; c < shape.group_out(); ++c) {
        const size_t channel = group * shape.group_out() + c;
        run_channel(op, shape, phases, channel, work,
                    dst + (sample * shape.channels_out + channel) * shape.num_out());
      }
    }
  });
}

}  // namespace afpq
