// Depthwise and small grouped convolutions on float planes: one output channel at a time, fma over
// its taps.
//
// The kernel reads taps where they lie in the input, and knows where the plane ends. When several
// output channels read the same planes, outputs are made in strips of rows whose input stays in L1;
// and if the stride is not 1 besides, the rows of a strip are cut into phases, once for all
// channels, so that they read contiguous floats. For stride 2 and kernel 3 (dilation 1), padded row
// x0 x1 x2 ...:
//
//   phase 0: x0 x2 x4 ...   tap 0 reads phase 0 from 0, tap 2 reads phase 0 from 1
//   phase 1: x1 x3 x5 ...   tap 1 reads phase 1 from 0
//
// Where bytes are wanted, all channels of a strip are made before it is rounded, so that its floats
// need not leave the cache.
#include <algorithm>

#include "core/scratch.h"
#include "drivers/conv_paths.h"

namespace afpq {
namespace {

constexpr size_t kStripElements = 7168;      // of input rows: 28 KB
constexpr size_t kStripRows = 4;             // kernels like multiples of it
constexpr size_t kFloats = size_t{1} << 15;  // of a strip that becomes bytes

// A strip is `height` output rows (less at the end) at one depth.
struct Strips {
  bool cut;       // into phases
  size_t extent;  // elements of a phase of a row
  size_t row;     // of all phases
  size_t planes;  // input rows come from so many (channel, tap in depth)
  size_t height;
  size_t rows;  // input rows of a strip in one plane
  size_t per_depth;
  size_t count;  // of an output plane
};

// `batch`: samples; `channels`: that make a part.
Strips strips_of(const ConvShape& shape, size_t batch, size_t channels, bool to_bytes) {
  Strips strips;
  strips.cut = shape.strides[2] > 1 && shape.group_out() > 1;
  strips.extent = shape.out[2] + shape.reach(2) / shape.strides[2] + 1;
  strips.row = strips.extent * shape.strides[2];
  strips.planes = shape.group_in() * shape.kernel[0];
  const size_t rows = kStripElements / (strips.row * strips.planes);
  const size_t fitting =
      rows > shape.reach(1) ? (rows - shape.reach(1) - 1) / shape.strides[1] + 1 : 1;
  strips.height = shape.group_out() == 1 ? shape.out[1]
                  : fitting < kStripRows ? fitting
                                         : fitting / kStripRows * kStripRows;
  if (to_bytes) {
    const size_t row = shape.channels_out * shape.out[2];
    strips.height = std::min(strips.height, std::max<size_t>(1, kFloats / row));
  }
  strips.height = std::min(strips.height, shape.out[1]);
  const size_t depth = ceil_div(shape.out[1], strips.height) * shape.out[0];
  strips.height = strip_height(
      strips.height, batch * ceil_div(shape.channels_out, channels) * depth,
      strips.height * shape.out[2] * channels * shape.num_taps() * shape.group_in(), kStripRows);
  strips.per_depth = ceil_div(shape.out[1], strips.height);
  strips.rows = (strips.height - 1) * shape.strides[1] + shape.reach(1) + 1;
  strips.count = shape.out[0] * strips.per_depth;
  return strips;
}

// Depth of the input under (output depth, tap), or -1 in the padding.
ptrdiff_t depth_of(const ConvShape& shape, size_t z, size_t kz) {
  const size_t at = z * shape.strides[0] + kz * shape.dilations[0];
  return at < shape.pads[0] || at - shape.pads[0] >= shape.in[0]
             ? -1
             : static_cast<ptrdiff_t>(at - shape.pads[0]);
}

// Where a strip lies: output rows from y at depth z, whose taps are within input rows [begin, end).
struct Place {
  size_t z, y, num_rows;
  size_t begin, end;
};

Place place_of(const ConvShape& shape, const Strips& strips, size_t strip) {
  Place place;
  place.z = strip / strips.per_depth;
  place.y = strip % strips.per_depth * strips.height;
  place.num_rows = std::min(strips.height, shape.out[1] - place.y);
  const size_t first = place.y * shape.strides[1], pad = shape.pads[1];
  place.begin = first > pad ? std::min(first - pad, shape.in[1]) : 0;
  place.end = std::min(first + strips.rows > pad ? first + strips.rows - pad : 0, shape.in[1]);
  place.end = std::max(place.end, place.begin);
  return place;
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
               const Place& place, const float* src, float* dst) {
  for (size_t plane = 0; plane < strips.planes; ++plane, dst += strips.rows * strips.row) {
    const size_t c = plane / shape.kernel[0];
    const ptrdiff_t depth = depth_of(shape, place.z, plane % shape.kernel[0]);
    if (depth < 0) continue;
    const size_t row = (c * shape.in[0] + static_cast<size_t>(depth)) * shape.in[1] + place.begin;
    cut_rows(kernels, shape, strips, src + row * shape.in[2], place.end - place.begin, dst);
  }
}

// Working memory of one task, and what it holds.
struct Workspace {
  float* rows;    // [planes][rows][row] if rows are cut, zero in the padding at the ends of rows
  AfpqTap* taps;  // [k] of `strip`, without those in the padding of depth
  size_t* order;  // [k] which step of k a tap is
  size_t num_taps = 0;
  float* weights;  // [4 * num_tiles][16] of `block`
  float* used;     // the steps of `order` in them
  float* floats;   // [channels][height][row of output] of a strip that becomes bytes
  size_t strip = ~size_t{0}, block = ~size_t{0};

  Workspace(const Strips& strips, const PackedWeight& weight, size_t num_floats) {
    using S = Scratch;
    const size_t size = strips.cut ? strips.planes * strips.rows * strips.row : 0;
    const size_t weights_size = weight.num_tiles * kTileCodes;
    Scratch& scratch = task_scratch();
    scratch.reset(S::room<float>(size) + S::room<AfpqTap>(weight.k) + S::room<size_t>(weight.k) +
                  2 * S::room<float>(weights_size) + S::room<float>(num_floats));
    rows = scratch.take<float>(size);
    taps = scratch.take<AfpqTap>(weight.k);
    order = scratch.take<size_t>(weight.k);
    weights = scratch.take<float>(weights_size);
    used = scratch.take<float>(weights_size);
    floats = scratch.take<float>(num_floats);
    std::fill(rows, rows + size, 0.0f);
  }
};

// Stored order: k = tap * channels_per_group + channel.
void list_taps(const ConvShape& shape, const Strips& strips, const Place& place, Workspace* work) {
  work->num_taps = 0;
  size_t step = 0;
  for (size_t kz = 0; kz < shape.kernel[0]; ++kz) {
    const ptrdiff_t depth = depth_of(shape, place.z, kz);
    for (size_t ky = 0; ky < shape.kernel[1]; ++ky) {
      for (size_t kx = 0; kx < shape.kernel[2]; ++kx) {
        for (size_t c = 0; c < shape.group_in(); ++c, ++step) {
          if (depth < 0) continue;
          AfpqTap& tap = work->taps[work->num_taps];
          work->order[work->num_taps++] = step;
          const size_t at = kx * shape.dilations[2];
          tap.row = static_cast<ptrdiff_t>(place.y * shape.strides[1] + ky * shape.dilations[1]) -
                    static_cast<ptrdiff_t>(shape.pads[1]);
          if (strips.cut) {
            tap.plane = (c * shape.kernel[0] + kz) * strips.rows * strips.row +
                        at % shape.strides[2] * strips.extent;
            tap.row -= static_cast<ptrdiff_t>(place.begin);
            tap.column = static_cast<ptrdiff_t>(at / shape.strides[2]);
          } else {
            tap.plane = (c * shape.in[0] + static_cast<size_t>(depth)) * shape.in[1] * shape.in[2];
            tap.column = static_cast<ptrdiff_t>(at) - static_cast<ptrdiff_t>(shape.pads[2]);
          }
        }
      }
    }
  }
}

// Steps of `order` of a block of weights, where these are not all.
const float* used_weights(const PackedWeight& weight, const Workspace& work) {
  if (work.num_taps == weight.k) return work.weights;
  for (size_t t = 0; t < work.num_taps; ++t) {
    const float* from = work.weights + work.order[t] * kTileN;
    std::copy(from, from + kTileN, work.used + t * kTileN);
  }
  return work.used;
}

// Channels that lie `channel_stride` elements apart, and what is added to them, or null.
struct Floats {
  float* data;
  size_t channel_stride;
  const float* residual;
};

// Output channels [first, first + count), all in one block of 16, rows of one strip. src: the
// planes that the first of them reads; dst: of channel 0.
void run_strip(const Conv& op, const ConvShape& shape, const Strips& strips, const Place& place,
               const PlanarEnd& end, size_t first, size_t count, const float* src,
               const Floats& dst, Workspace* work) {
  static constexpr float kNoBias[kTileN] = {};
  const PackedWeight& weight = *op.weight;
  if (work->block != first / kTileN) {
    work->block = first / kTileN;
    op.kernels->expand_f32_afp(weight.block(work->block), weight.num_tiles, weight.format.bits(),
                               weight.tables.value, work->weights);
  }
  AfpqPlanar planar = {};
  planar.src = strips.cut ? work->rows : src;
  planar.taps = work->taps;
  planar.weights = used_weights(weight, *work) + first % kTileN;
  planar.scales = end.scales + first;
  planar.bias = end.bias ? end.bias + first : kNoBias;
  planar.dst = dst.data + first * dst.channel_stride;
  planar.num_taps = work->num_taps;
  planar.num_channels = count;
  planar.src_channel_stride = shape.group_out() == 1 ? shape.group_in() * shape.num_in() : 0;
  planar.dst_channel_stride = dst.channel_stride;
  planar.src_rows = strips.cut ? place.end - place.begin : shape.in[1];
  planar.src_columns = strips.cut ? strips.extent : shape.in[2];
  planar.src_stride = strips.cut ? strips.row : shape.in[2];
  planar.row_step = shape.strides[1];
  planar.column_step = strips.cut ? 1 : shape.strides[2];
  planar.num_rows = place.num_rows;
  planar.row_size = planar.dst_stride = shape.out[2];
  // What is added later is clamped later.
  planar.low = dst.residual ? -kInfinity : end.low;
  planar.high = dst.residual ? kInfinity : end.high;
  op.kernels->planar_f32(&planar);
  if (dst.residual) {
    op.kernels->add_clamp_f32(dst.residual + first * dst.channel_stride, dst.channel_stride, count,
                              place.num_rows * shape.out[2], end.low, end.high, planar.dst);
  }
}

// Output channels [first, last) of a strip of one sample: a whole group or more groups of one
// channel.
void run_channels(const Conv& op, const ConvShape& shape, const Strips& strips, const Place& place,
                  const PlanarEnd& end, size_t first, size_t last, const float* src,
                  const Floats& dst, Workspace* work) {
  const auto planes = [&](size_t channel) {
    return src + channel / shape.group_out() * shape.group_in() * shape.num_in();
  };
  if (strips.cut) cut_strip(*op.kernels, shape, strips, place, planes(first), work->rows);
  for (size_t c = first; c < last;) {
    const size_t count = std::min(last, (c / kTileN + 1) * kTileN) - c;
    run_strip(op, shape, strips, place, end, c, count, planes(c), dst, work);
    c += count;
  }
}

// A strip of all channels to rows of bytes.
void round_strip(const Conv& op, const ConvShape& shape, const Floats& src, uint8_t* dst) {
  AfpqQuantize quantize = step_quantizer(op.dst_rounding);
  quantize.planes[0] = dst;
  op.kernels->quantize_transpose_u8_f32(src.data, src.channel_stride, shape.channels_out,
                                        src.channel_stride, &quantize);
}

// So many that there are some parts for each of a few threads: what a thread makes should be whole
// planes, as in `run_small_sample`.
size_t planes_of_part(size_t channels, size_t batch) {
  constexpr size_t kLeastParts = 4;
  return std::min<size_t>(kTileN, ceil_div(channels, ceil_div(kLeastParts, batch)));
}

}  // namespace

PlanarEnd::PlanarEnd(const Conv& op, size_t channels, bool to_bytes)
    : scales(op.weight->scales.data()), bias(op.bias), low(op.low), high(op.high) {
  if (!to_bytes) return;
  const OutputUnit unit = {op.dst_rounding.scale};
  Scratch& scratch = layer_scratch();
  scratch.reset(2 * Scratch::room<float>(channels));
  scales = in_units(scales, channels, unit, &scratch);
  bias = in_units(bias, channels, unit, &scratch);
  low = unit(low);
  high = unit(high);
}

void conv_planar(const Conv& op, const ConvShape& shape, const float* src, size_t batch,
                 const ConvTarget& dst, const Parallel& parallel) {
  const bool to_bytes = dst.bytes != nullptr;
  const PlanarEnd end(op, shape.channels_out, to_bytes);
  // A part is a group, or a block of groups of one channel; an item is a strip of one, or of all.
  const size_t part = shape.group_out() > 1 ? shape.group_out()
                      : to_bytes            ? std::min<size_t>(kTileN, shape.channels_out)
                                            : planes_of_part(shape.channels_out, batch);
  const size_t channels = to_bytes ? shape.channels_out : part;
  const Strips strips = strips_of(shape, batch, channels, to_bytes);
  const size_t items = ceil_div(shape.channels_out, channels) * strips.count;
  const size_t total = batch * items, row = shape.out[2];
  const size_t work_of_one = strips.height * row * op.weight->k * channels;
  const size_t step = planar_step(total, work_of_one);
  parallel_for(parallel, ceil_div(total, step), [&](size_t task) {
    Workspace work(strips, *op.weight, to_bytes ? channels * strips.height * row : 0);
    for (size_t i = task * step; i < std::min(total, (task + 1) * step); ++i) {
      const size_t sample = i / items, strip = i % strips.count;
      const size_t begin = i % items / strips.count * channels;
      const Place place = place_of(shape, strips, strip);
      if (strip != work.strip) list_taps(shape, strips, place, &work);
      work.strip = strip;
      const size_t first_pixel = (place.z * shape.out[1] + place.y) * row;
      const size_t sample_at = sample * shape.channels_out * shape.num_out();
      const size_t at = sample_at + first_pixel;
      const float* residual = dst.float_residual ? dst.float_residual + at : nullptr;
      const Floats floats = to_bytes ? Floats{work.floats, place.num_rows * row, nullptr}
                                     : Floats{dst.floats + at, shape.num_out(), residual};
      const size_t last = std::min(begin + channels, shape.channels_out);
      for (size_t c = begin; c < last; c += part) {
        run_channels(op, shape, strips, place, end, c, std::min(c + part, last),
                     src + sample * shape.channels_in * shape.num_in(), floats, &work);
      }
      if (to_bytes)
        round_strip(op, shape, floats, dst.bytes + sample_at + first_pixel * shape.channels_out);
    }
  });
}

}  // namespace afpq
