// Depthwise convolutions of bytes: each tap's channels meet their own weights.
//
//   for each task (some strips of lines x a panel of 64 channels):            parallel
//     expand the panel's codes into words, pairs of taps next to each other
//     for each strip: copy the pixels that its taps read, with their padding, next to each other
//       for each chunk of pixels: sums; scale, finish, store
//
// In a strip, every tap of every pixel is there, and as far from the pixel as it always is.
#include <algorithm>
#include <cstring>

#include "core/scratch.h"
#include "drivers/conv_paths.h"
#include "drivers/panel.h"

namespace afpq {
namespace {

constexpr size_t kTaskWork = size_t{1} << 18;    // products that are worth a task
constexpr size_t kChunkPixels = 4 * kBlockRows;  // whose sums are made at a time
constexpr size_t kStripBytes = size_t{48} << 10;
constexpr size_t kManyPixels = 128;  // that are worth two strips

// How the outputs of a plane are cut: into strips of `lines` lines and `columns` columns, and those
// into chunks of whole lines. Either all columns are in a strip, or it is one line.
struct Strips {
  size_t columns, lines, chunk_lines;
  size_t per_line, per_plane, count;
  size_t in_columns, in_lines;  // of input that a strip reads

  explicit Strips(const ConvShape& shape) {
    columns = std::min(shape.out[2], kChunkPixels);
    in_columns = reach(shape, 2, columns);
    chunk_lines = 1;
    if (columns == shape.out[2])
      chunk_lines = std::max<size_t>(1, std::min(shape.out[1], kChunkPixels / columns));
    lines = chunk_lines;
    while (columns == shape.out[2] && lines < shape.out[1] &&
           shape.kernel[0] * reach(shape, 1, lines + chunk_lines) * in_columns * kPanelN <=
               kStripBytes) {
      lines += chunk_lines;
    }
    lines = std::min(lines, shape.out[1]);
    // Pixels, not channels, are shared out, as in the layers around.
    size_t strips = ceil_div(shape.out[1], lines);
    if (columns == shape.out[2] && shape.num_out() >= kManyPixels) strips += strips % 2;
    lines = ceil_div(shape.out[1], strips);
    in_lines = reach(shape, 1, lines);
    per_line = ceil_div(shape.out[2], columns);
    per_plane = ceil_div(shape.out[1], lines) * per_line;
    count = shape.out[0] * per_plane;
  }

 private:
  // Inputs of an axis that some outputs next to each other read.
  static size_t reach(const ConvShape& shape, int axis, size_t outputs) {
    return (outputs - 1) * shape.strides[axis] + (shape.kernel[axis] - 1) * shape.dilations[axis] +
           1;
  }
};

// Working memory of one task.
struct Workspace {
  int16_t* words;        // [blocks][tiles][64]
  uint8_t* pixels;       // [planes][in_lines][in_columns][kPanelN]
  const uint8_t** taps;  // [num_taps], of the first pixel of a chunk
  int32_t* sums;         // [kChunkPixels][kPanelN]
  float* scaled;         // [kBlockRows][kPanelN]

  Workspace(const GemmJob& job, const ConvShape& shape, const Strips& strips) {
    using S = Scratch;
    const size_t codes = kPanelBlocks * job.weight->num_tiles * kTileCodes;
    const size_t bytes = shape.kernel[0] * strips.in_lines * strips.in_columns * kPanelN;
    const size_t num_sums = kChunkPixels * kPanelN, num_scaled = kBlockRows * kPanelN;
    Scratch& scratch = task_scratch();
    scratch.reset(S::room<int16_t>(codes) + S::room<uint8_t>(bytes) +
                  S::room<void*>(shape.num_taps()) + S::room<int32_t>(num_sums) +
                  S::room<float>(num_scaled));
    words = scratch.take<int16_t>(codes);
    pixels = scratch.take<uint8_t>(bytes);
    taps = scratch.take<const uint8_t*>(shape.num_taps());
    sums = scratch.take<int32_t>(num_sums);
    scaled = scratch.take<float>(num_scaled);
  }
};

void expand(const GemmJob& job, const Panel& panel, int16_t* words) {
  const PackedWeight& weight = *job.weight;
  for (size_t b = 0; b < panel.num_blocks; ++b, words += weight.num_tiles * kTileCodes) {
    job.kernels->expand_s16_afp(weight.block(panel.first_block + b), weight.num_tiles,
                                weight.format.bits(), weight.tables.joined, words);
  }
}

// A strip's outputs: columns from x, lines from y, of plane z.
struct Place {
  size_t z, y, x, num_lines, num_columns;

  Place(const ConvShape& shape, const Strips& strips, size_t strip)
      : z(strip / strips.per_plane),
        y(strip % strips.per_plane / strips.per_line * strips.lines),
        x(strip % strips.per_line * strips.columns),
        num_lines(std::min(strips.lines, shape.out[1] - y)),
        num_columns(std::min(strips.columns, shape.out[2] - x)) {}
};

// The first bytes of pixels, which are `stride` apart, next to each other. kBytes: so many, or 0.
template <size_t kBytes>
void copy_bytes(const uint8_t* src, size_t stride, size_t bytes, size_t count, uint8_t* dst) {
  for (size_t i = 0; i < count; ++i)
    std::memcpy(dst + i * kPanelN, src + i * stride, kBytes ? kBytes : bytes);
}

void copy_pixels(const uint8_t* src, size_t stride, size_t bytes, size_t count, uint8_t* dst) {
  const auto run = bytes == 4 * kTileN   ? copy_bytes<4 * kTileN>
                   : bytes == 2 * kTileN ? copy_bytes<2 * kTileN>
                   : bytes == kTileN     ? copy_bytes<kTileN>
                                         : copy_bytes<0>;
  run(src, stride, bytes, count, dst);
}

// One line of a strip's input: `line` and `column` count from where the padding begins.
void copy_line(const GemmJob& job, const ConvShape& shape, const Panel& panel, size_t plane,
               size_t line, size_t column, size_t num_columns, uint8_t* dst) {
  const uint8_t padding = *static_cast<const uint8_t*>(job.lhs.padding[0]);
  const auto inside = [&](size_t at, int axis) { return at - shape.pads[axis] < shape.in[axis]; };
  if (!inside(plane, 0) || !inside(line, 1)) {
    std::memset(dst, padding, num_columns * kPanelN);
    return;
  }
  const size_t pad = shape.pads[2], end = column + num_columns;
  const size_t first = std::clamp(pad, column, end);
  const size_t last = std::clamp(pad + shape.in[2], first, end);
  const size_t row = ((plane - shape.pads[0]) * shape.in[1] + line - shape.pads[1]) * shape.in[2];
  const uint8_t* src = static_cast<const uint8_t*>(job.lhs.planes[0]) +
                       (row + first - pad) * job.lhs.stride + panel.first_block * kTileN;
  std::memset(dst, padding, (first - column) * kPanelN);
  copy_pixels(src, job.lhs.stride, panel.num_channels, last - first,
              dst + (first - column) * kPanelN);
  std::memset(dst + (last - column) * kPanelN, padding, (end - last) * kPanelN);
}

void copy_strip(const GemmJob& job, const ConvShape& shape, const Panel& panel,
                const Strips& strips, const Place& place, uint8_t* dst) {
  for (size_t kz = 0; kz < shape.kernel[0]; ++kz) {
    const size_t plane = place.z * shape.strides[0] + kz * shape.dilations[0];
    for (size_t i = 0; i < strips.in_lines; ++i, dst += strips.in_columns * kPanelN) {
      copy_line(job, shape, panel, plane, place.y * shape.strides[1] + i,
                place.x * shape.strides[2], strips.in_columns, dst);
    }
  }
}

// Where the taps of the first pixel of a line of a strip are.
void point_at(const ConvShape& shape, const Strips& strips, size_t line, const Workspace& work) {
  const uint8_t** tap = work.taps;
  for (size_t kz = 0; kz < shape.kernel[0]; ++kz) {
    for (size_t ky = 0; ky < shape.kernel[1]; ++ky) {
      const size_t at = kz * strips.in_lines + line * shape.strides[1] + ky * shape.dilations[1];
      for (size_t kx = 0; kx < shape.kernel[2]; ++kx)
        *tap++ = work.pixels + (at * strips.in_columns + kx * shape.dilations[2]) * kPanelN;
    }
  }
}

// Sums of output rows [first, first + count).
void finish(const GemmJob& job, const Panel& panel, size_t first, size_t count,
            const Workspace& work) {
  if (finishes_at_once(job)) return finish_rows(job, panel, first, count, &work.sums);
  for (size_t i = 0; i < count; i += kBlockRows) {
    const size_t rows = std::min(kBlockRows, count - i);
    int32_t* sums = work.sums + i * kPanelN;
    combine_rows(job, panel, first + i, rows, 0, &sums, work.scaled);
    store_rows(job, panel, first + i, rows, work.scaled);
  }
}

void run(const GemmJob& job, const ConvShape& shape, const Panel& panel, const Strips& strips,
         size_t begin, size_t end) {
  const Workspace work(job, shape, strips);
  expand(job, panel, work.words);
  for (size_t strip = begin; strip < end; ++strip) {
    const Place place(shape, strips, strip);
    copy_strip(job, shape, panel, strips, place, work.pixels);
    for (size_t line = 0; line < place.num_lines; line += strips.chunk_lines) {
      const size_t lines = std::min(strips.chunk_lines, place.num_lines - line);
      point_at(shape, strips, line, work);
      job.kernels->depthwise_s32_u8_s16(work.taps, shape.strides[2] * kPanelN,
                                        shape.strides[1] * strips.in_columns * kPanelN,
                                        shape.num_taps(), work.words, job.weight->num_tiles, lines,
                                        place.num_columns, panel.num_blocks, work.sums);
      const size_t first = (place.z * shape.out[1] + place.y + line) * shape.out[2] + place.x;
      finish(job, panel, first, lines * place.num_columns, work);
    }
  }
}

}  // namespace

void depthwise(const GemmJob& job, const ConvShape& shape, const Parallel& parallel) {
  const Strips strips(shape);
  const size_t panels = ceil_div(job.n, kPanelN);
  const size_t work = strips.lines * strips.columns * kPanelN * shape.num_taps();
  const size_t step =
      std::clamp<size_t>(kTaskWork / work, 1, std::max<size_t>(1, strips.count / 2));
  const size_t splits = ceil_div(strips.count, step);
  parallel_for(parallel, panels * splits, [&](size_t task) {
    const size_t begin = task / panels * step;
    run(job, shape, panel_of(job, task % panels), strips, begin,
        std::min(begin + step, strips.count));
  });
}

}  // namespace afpq
