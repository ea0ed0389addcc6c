// The kernels of `_core.kernels` that work on planes: convolutions with pixels in the lanes or
// straight from floats.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/kernel_arguments.h"

using namespace nb::literals;

namespace {

// src: [num_channels, src_stride], dst: [num_channels / 2, pixel_stride, 2] or [num_channels / 4,
// pixel_stride, 4]
template <typename T>
AfpqPixelSource pixel_source(Array<const float, 2> src, size_t num_rows, size_t row_size,
                             size_t row_pitch, Array<T, 3> dst) {
  require(dst.shape(2) == 4 / sizeof(T) && src.shape(0) == dst.shape(0) * dst.shape(2),
          "dst must be [num_channels / steps, pixel_stride, steps]");
  require(src.shape(0) % kTileK == 0, "num_channels must be a multiple of 4");
  require(num_rows >= 1 && row_pitch >= row_size && num_rows * row_size <= src.shape(1) &&
              (num_rows - 1) * row_pitch + row_size <= dst.shape(1),
          "the rows are beyond a stride");
  return {src.data(), src.shape(1), src.shape(0), num_rows, row_size, row_pitch, dst.shape(1)};
}

void quantize_pixels_u8_f32(const std::string& isa, Array<const float, 2> src, size_t num_rows,
                            size_t row_size, size_t row_pitch, float inverse_scale,
                            int32_t zero_point, Array<uint8_t, 3> dst, const std::string& format,
                            float scale) {
  const AfpqPixelSource source = pixel_source(src, num_rows, row_size, row_pitch, dst);
  const AfpqQuantize q = quantizer(inverse_scale, zero_point, format, scale, dst.data(), 1, 0);
  table_of(isa).quantize_pixels_u8_f32(&source, &q);
}

void quantize_pixels_s16_f32(const std::string& isa, Array<const float, 2> src, size_t num_rows,
                             size_t row_size, size_t row_pitch, float inverse_scale,
                             int32_t zero_point, int levels, Array<int16_t, 3> dst,
                             const std::string& format, float scale) {
  const AfpqPixelSource source = pixel_source(src, num_rows, row_size, row_pitch, dst);
  const AfpqQuantize q =
      word_quantizer(inverse_scale, zero_point, format, scale, levels, dst.data());
  table_of(isa).quantize_pixels_s16_f32(&source, &q);
}

// lhs: [groups of a tap, pixel_stride, steps], taps: pixels, rhs: [planes, num_tiles, 64],
// column_sums: [planes, num_channels], dst: [num_channels, channel_stride]
template <typename Lhs, typename Rhs, auto kMember>
void gemm_pixels(const std::string& isa, Array<const Lhs, 3> lhs, const std::vector<size_t>& taps,
                 size_t num_pixels, size_t row_pitch, size_t row_size, Array<const Rhs, 3> rhs,
                 int limit, int32_t zero_point, Array<const int32_t, 2> column_sums,
                 Array<const float, 1> scales, Array<const float, 1> bias, float row_scale,
                 float low, float high, Array<float, 2> dst) {
  const size_t channels = dst.shape(0);
  const size_t planes = rhs.shape(0);
  require(lhs.shape(2) == 4 / sizeof(Lhs) && rhs.shape(2) == kTileCodes &&
              taps.size() * lhs.shape(0) * lhs.shape(2) == rhs.shape(1) * kTileK,
          "lhs must be [groups of a tap, pixel_stride, steps], rhs [planes, num_tiles, 64]");
  require(planes == 1 || (planes == 2 && sizeof(Rhs) == 2),
          "rhs must have one plane, or two of words");
  const size_t read = *std::max_element(taps.begin(), taps.end()) + (num_pixels + 15) / 16 * 16;
  require(num_pixels >= 1 && num_pixels <= kMostPixels && read <= lhs.shape(1),
          "num_pixels is beyond 512, or vectors of 16 pixels are beyond the stride of lhs");
  require(row_size >= 1 && row_size <= row_pitch &&
              num_pixels / row_pitch * row_size + std::min(num_pixels % row_pitch, row_size) <=
                  dst.shape(1),
          "rows do not fit dst, or row_size is beyond row_pitch");
  require(channels >= 1 && channels <= kTileN && column_sums.shape(0) == planes &&
              column_sums.shape(1) == channels && scales.shape(0) == channels &&
              bias.shape(0) == channels,
          "column_sums, scales and bias must have num_channels, 1..16, elements");
  AfpqPixels args = {};
  args.lhs = lhs.data();
  args.taps = taps.data();
  args.num_taps = taps.size();
  args.rhs = rhs.data();
  if (planes == 2) {
    args.rhs_high = rhs.data() + rhs.shape(1) * kTileCodes;
    args.column_sums_high = column_sums.data() + channels;
  }
  args.num_tiles = rhs.shape(1);
  args.pixel_stride = lhs.shape(1);
  args.num_pixels = num_pixels;
  args.row_pitch = row_pitch;
  args.row_size = row_size;
  args.num_channels = channels;
  args.limit = limit;
  args.zero_point = zero_point;
  args.column_sums = column_sums.data();
  args.scales = scales.data();
  args.bias = bias.data();
  args.row_scale = row_scale;
  args.low = low;
  args.high = high;
  args.dst = dst.data();
  args.channel_stride = dst.shape(1);
  (table_of(isa).*kMember)(&args);
}

// src: [num_rows, src_stride], dst: [num_rows, dst_stride]
void pick_f32(const std::string& isa, Array<const float, 2> src, size_t step, size_t count,
              Array<float, 2> dst) {
  require(src.shape(0) == dst.shape(0), "src and dst must have as many rows");
  require(step >= 1 && count >= 1 && count <= dst.shape(1) && (count - 1) * step < src.shape(1),
          "step or count is beyond a row");
  table_of(isa).pick_f32(src.data(), src.shape(1), step, src.shape(0), count, dst.shape(1),
                         dst.data());
}

// src and dst: [num_channels, stride]
void add_clamp_f32(const std::string& isa, Array<const float, 2> src, size_t count, float low,
                   float high, Array<float, 2> dst) {
  require(src.shape(0) == dst.shape(0) && src.shape(1) == dst.shape(1),
          "src and dst must have one shape");
  require(count <= dst.shape(1), "count is beyond a row");
  table_of(isa).add_clamp_f32(src.data(), src.shape(1), src.shape(0), count, low, high, dst.data());
}

// src: [channels or 1, planes, src_rows, src_columns], taps: [num_taps, 3] of plane, row and
// column, weights: [num_taps, 16], scales and bias: [num_channels], dst: [num_channels, num_rows,
// dst_stride]
void planar_f32(const std::string& isa, Array<const float, 4> src, Array<const int32_t, 2> taps,
                Array<const float, 2> weights, size_t row_step, size_t column_step,
                Array<const float, 1> scales, Array<const float, 1> bias, float low, float high,
                size_t row_size, Array<float, 3> dst) {
  const size_t channels = dst.shape(0), plane = src.shape(2) * src.shape(3);
  require(taps.shape(1) == 3 && weights.shape(0) == taps.shape(0) && weights.shape(1) == kTileN,
          "taps must be [num_taps, 3], weights [num_taps, 16]");
  require(channels >= 1 && channels <= kTileN, "dst must have 1..16 channels");
  require(src.shape(0) == 1 || src.shape(0) == channels, "src must have as many channels, or one");
  require(scales.shape(0) == channels && bias.shape(0) == channels,
          "scales and bias must be [num_channels]");
  require(row_size <= dst.shape(2), "row_size is beyond the stride of dst");
  require(row_step >= 1 && column_step >= 1, "steps must be positive");
  std::vector<AfpqTap> list(taps.shape(0));
  for (size_t t = 0; t < list.size(); ++t) {
    const int32_t* tap = taps.data() + 3 * t;
    require(tap[0] >= 0 && static_cast<size_t>(tap[0]) < src.shape(1), "a tap has no such plane");
    list[t] = {static_cast<size_t>(tap[0]) * plane, tap[1], tap[2]};
  }
  AfpqPlanar args = {};
  args.src = src.data();
  args.taps = list.data();
  args.weights = weights.data();
  args.scales = scales.data();
  args.bias = bias.data();
  args.dst = dst.data();
  args.num_taps = list.size();
  args.num_channels = channels;
  args.src_channel_stride = src.shape(0) == 1 ? 0 : src.shape(1) * plane;
  args.dst_channel_stride = dst.shape(1) * dst.shape(2);
  args.src_rows = src.shape(2);
  args.src_columns = args.src_stride = src.shape(3);
  args.row_step = row_step;
  args.column_step = column_step;
  args.num_rows = dst.shape(1);
  args.row_size = row_size;
  args.dst_stride = dst.shape(2);
  args.low = low;
  args.high = high;
  table_of(isa).planar_f32(&args);
}

// src: [elements], taps: [num_taps], weights: [num_blocks, 4 * num_tiles, 16], scales and bias:
// [num_channels], dst: [num_pixels, 64]
void planar_rows_f32(const std::string& isa, Array<const float, 1> src,
                     Array<const uint64_t, 1> taps, Array<const uint64_t, 1> pixels,
                     Array<const float, 3> weights, Array<const float, 1> scales,
                     Array<const float, 1> bias, Array<float, 2> dst) {
  static_assert(sizeof(size_t) == sizeof(uint64_t));
  const size_t channels = scales.shape(0), num_pixels = dst.shape(0);
  require(channels >= 1 && channels <= kPanelN && bias.shape(0) == channels,
          "scales and bias must be [1..64]");
  require(weights.shape(0) == afpq::ceil_div(channels, kTileN) && weights.shape(1) % kTileK == 0 &&
              weights.shape(1) >= taps.shape(0) && weights.shape(2) == kTileN,
          "weights must be [num_blocks, a multiple of 4, 16]");
  require(num_pixels >= 1 && pixels.shape(0) == num_pixels && dst.shape(1) == kPanelN,
          "pixels must be [num_pixels], dst [num_pixels, 64]");
  const size_t last = *std::max_element(pixels.data(), pixels.data() + num_pixels);
  for (size_t t = 0; t < taps.shape(0); ++t)
    require(taps.data()[t] + last < src.shape(0), "a tap is beyond src");
  AfpqPlanarRows args = {};
  args.src = src.data();
  args.taps = reinterpret_cast<const size_t*>(taps.data());
  args.pixels = reinterpret_cast<const size_t*>(pixels.data());
  args.weights = weights.data();
  args.scales = scales.data();
  args.bias = bias.data();
  args.dst = dst.data();
  args.num_taps = taps.shape(0);
  args.num_tiles = weights.shape(1) / kTileK;
  args.num_pixels = num_pixels;
  args.num_channels = channels;
  table_of(isa).planar_rows_f32(&args);
}

// src: [elements], taps: [num_taps], weights: [num_taps, 16], scales and bias: [16], dst:
// [num_lines, num_columns, 16]
void depthwise_f32(const std::string& isa, Array<const float, 1> src,
                   const std::vector<size_t>& taps, Array<const float, 2> weights, size_t step,
                   size_t line_step, Array<const float, 1> scales, Array<const float, 1> bias,
                   float low, float high, Array<float, 3> dst) {
  const size_t lines = dst.shape(0), columns = dst.shape(1);
  require(weights.shape(0) == taps.size() && weights.shape(1) == kTileN &&
              scales.shape(0) == kTileN && bias.shape(0) == kTileN && dst.shape(2) == kTileN,
          "weights must be [num_taps, 16], scales and bias [16], dst [.., 16]");
  require(lines >= 1 && columns >= 1, "dst is empty");
  for (const size_t tap : taps) {
    require(tap + (lines - 1) * line_step + (columns - 1) * step + kTileN <= src.shape(0),
            "a tap is beyond src");
  }
  const AfpqDepthwise args = {
      src.data(), taps.data(), weights.data(), scales.data(), bias.data(), dst.data(), taps.size(),
      step,       line_step,   lines,          columns,       low,         high};
  table_of(isa).depthwise_f32(&args);
}

}  // namespace

void bind_plane_kernels(nb::module_& m) {
  using K = AfpqKernels;
  m.def("quantize_pixels_u8_f32", quantize_pixels_u8_f32, "isa"_a, "src"_a, "num_rows"_a,
        "row_size"_a, "row_pitch"_a, "inverse_scale"_a, "zero_point"_a, "dst"_a, "format"_a = "",
        "scale"_a = 0.0f);
  m.def("quantize_pixels_s16_f32", quantize_pixels_s16_f32, "isa"_a, "src"_a, "num_rows"_a,
        "row_size"_a, "row_pitch"_a, "inverse_scale"_a, "zero_point"_a, "levels"_a, "dst"_a,
        "format"_a = "", "scale"_a = 0.0f);
  m.def("gemm_pixels_f32_u8_s8", gemm_pixels<uint8_t, int8_t, &K::gemm_pixels_f32_u8_s8>);
  m.def("gemm_pixels_f32_s16_s16", gemm_pixels<int16_t, int16_t, &K::gemm_pixels_f32_s16_s16>);
  m.def("add_clamp_f32", add_clamp_f32);
  m.def("pick_f32", pick_f32);
  m.def("planar_f32", planar_f32);
  m.def("planar_rows_f32", planar_rows_f32);
  m.def("depthwise_f32", depthwise_f32);
}
