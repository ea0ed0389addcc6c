// Depthwise and small grouped convolutions on float planes: one output channel at a time, fma over
// its taps.
//
// A plane is copied once into padded scratch, cut into phases so that any stride reads contiguous
// floats. For one axis with stride 2 and kernel 3 (dilation 1), padded input x0 x1 x2 ...:
//
//   phase 0: x0 x2 x4 ...   tap 0 reads phase 0 from 0, tap 2 reads phase 0 from 1
//   phase 1: x1 x3 x5 ...   tap 1 reads phase 1 from 0
//
// All three axes are cut so; then output (z, y, x) of every tap lies at one common offset, and a
// whole plane of outputs (with some columns to drop at the end of each row) is one call of the
// kernel.
#include <algorithm>

#include "core/scratch.h"
#include "drivers/conv.h"

namespace afpq {
namespace {

struct Phases {
  size_t count[3];   // strides
  size_t extent[3];  // of one phase, per axis
  size_t plane;      // elements of one phase
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
void cut_row(const ConvShape& shape, const Phases& phases, const float* row, size_t z, size_t y,
             float* dst) {
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
    const size_t first = pad <= phase ? phase : phase + ceil_div(pad - phase, sx) * sx;
    if (first >= limit) continue;
    float* line = base + phase * phases.plane + first / sx;
    const float* from = row + (first - pad);
    const size_t count = ceil_div(limit - first, sx);
    if (sx == 2) {  // a constant step, so that the compiler makes shuffles of it
      for (size_t i = 0; i < count; ++i) line[i] = from[2 * i];
    } else {
      for (size_t i = 0; i < count; ++i) line[i] = from[sx * i];
    }
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

size_t phases_size(const ConvShape& shape, const Phases& phases) {
  return shape.group_in() * phases.num_phases * phases.plane;
}

struct Workspace {
  float* phases;       // [group_in][num_phases][plane], zero wherever no input lands
  float* line;         // outputs of a plane with the columns to drop
  const float** taps;  // [k]
  float* weights;      // [k]
};

// `phases_in` holds the phases of the only group, or is null: then room for the phases of one group
// is taken.
Workspace make_workspace(const ConvShape& shape, const Phases& phases, size_t k, float* phases_in) {
  const size_t size = phases_in ? 0 : phases_size(shape, phases);
  Scratch& scratch = task_scratch();
  using S = Scratch;
  scratch.reset(S::room<float>(size) + S::room<float>(phases.plane) + S::room<float*>(k) +
                S::room<float>(k));
  Workspace work;
  float* own = scratch.take<float>(size);
  work.phases = phases_in ? phases_in : own;
  work.line = scratch.take<float>(phases.plane);
  work.taps = scratch.take<const float*>(k);
  work.weights = scratch.take<float>(k);
  std::fill(own, own + size, 0.0f);
  // Stored order: k = tap * channels_per_group + channel.
  const float** tap = work.taps;
  for (size_t z = 0; z < shape.kernel[0]; ++z) {
    for (size_t y = 0; y < shape.kernel[1]; ++y) {
      for (size_t x = 0; x < shape.kernel[2]; ++x) {
        const size_t at[3] = {z, y, x};
        for (size_t c = 0; c < shape.group_in(); ++c) {
          *tap++ =
              work.phases + c * phases.num_phases * phases.plane + tap_start(shape, phases, at);
        }
      }
    }
  }
  return work;
}

void run_channel(const Conv& op, const ConvShape& shape, const Phases& phases, size_t channel,
                 const Workspace& work, float* dst) {
  const PackedWeight& weight = *op.weight;
  for (size_t i = 0; i < weight.k; ++i)
    work.weights[i] = weight.tables.value[weight.code(channel, i)];
  const float scale = weight.scales[channel], bias = op.bias ? op.bias[channel] : 0.0f;
  const size_t row = phases.extent[2], rows = phases.extent[1];
  for (size_t z = 0; z < shape.out[0]; ++z) {
    // The last row ends with its last output, so no read goes past the last phase.
    const size_t count = (shape.out[1] - 1) * row + shape.out[2];
    op.kernels->planar_f32(work.taps, work.weights, weight.k, count, scale, bias, op.low, op.high,
                           work.line);
    for (size_t y = 0; y < shape.out[1]; ++y, dst += shape.out[2]) {
      std::copy(work.line + y * row, work.line + y * row + shape.out[2], dst);
    }
    for (size_t i = 0; i < weight.k; ++i) work.taps[i] += rows * row;
  }
  for (size_t i = 0; i < weight.k; ++i) work.taps[i] -= shape.out[0] * rows * row;
}

void cut_group(const ConvShape& shape, const Phases& phases, const float* src, float* dst) {
  for (size_t c = 0; c < shape.group_in(); ++c) {
    cut_plane(shape, phases, src + c * shape.num_in(), dst + c * phases.num_phases * phases.plane);
  }
}

// One group: its planes are cut once, its output channels are shared out.
void run_one_group(const Conv& op, const ConvShape& shape, const Phases& phases, const float* src,
                   size_t batch, float* dst, const Parallel& parallel) {
  const size_t size = phases_size(shape, phases);
  layer_scratch().reset(Scratch::room<float>(size));
  float* cut = layer_scratch().take<float>(size);
  std::fill(cut, cut + size, 0.0f);
  const size_t step = std::max<size_t>(1, ceil_div(shape.channels_out, 8));
  for (size_t sample = 0; sample < batch; ++sample) {
    cut_group(shape, phases, src + sample * shape.channels_in * shape.num_in(), cut);
    parallel_for(parallel, ceil_div(shape.channels_out, step), [&](size_t task) {
      const Workspace work = make_workspace(shape, phases, op.weight->k, cut);
      for (size_t c = task * step; c < std::min(shape.channels_out, (task + 1) * step); ++c) {
        run_channel(op, shape, phases, c, work,
                    dst + (sample * shape.channels_out + c) * shape.num_out());
      }
    });
  }
}

// Many groups: each task cuts and uses one group after another, so the planes stay in its cache.
void run_groups(const Conv& op, const ConvShape& shape, const Phases& phases, const float* src,
                size_t batch, float* dst, const Parallel& parallel) {
  const size_t total = batch * shape.groups,
               work_of_one = phases.plane * op.weight->k * shape.group_out();
  const size_t step =
      std::max<size_t>(1, std::min(ceil_div(total, 8), (size_t{1} << 18) / work_of_one));
  parallel_for(parallel, ceil_div(total, step), [&](size_t task) {
    const Workspace work = make_workspace(shape, phases, op.weight->k, nullptr);
    for (size_t i = task * step; i < std::min(total, (task + 1) * step); ++i) {
      cut_group(shape, phases, src + i * shape.group_in() * shape.num_in(), work.phases);
      for (size_t c = 0; c < shape.group_out(); ++c) {
        run_channel(op, shape, phases, i % shape.groups * shape.group_out() + c, work,
                    dst + (i * shape.group_out() + c) * shape.num_out());
      }
    }
  });
}

}  // namespace

void conv_planar(const Conv& op, const ConvShape& shape, const float* src, size_t batch, float* dst,
                 const Parallel& parallel) {
  const Phases phases = phases_of(shape);
  const auto run = shape.groups == 1 ? run_one_group : run_groups;
  run(op, shape, phases, src, batch, dst, parallel);
}

}  // namespace afpq
