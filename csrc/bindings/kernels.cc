// `_core.kernels`: every function of every kernel table with NumPy arguments, for tests and
// benchmarks.
//
// Each function takes the name of the table first and writes into arrays of the caller. Shapes are
// checked here, since kernels check nothing.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/kernel_arguments.h"

using namespace nb::literals;

namespace {

std::vector<std::string> isa_names() {
  const std::vector<const char*> names = afpq::isa_names();
  return {names.begin(), names.end()};
}

std::string active_isa() {
  const char* error = "";
  const AfpqKernels* kernels = afpq::active_kernels(&error);
  if (kernels == nullptr) throw std::invalid_argument(error);
  return kernels->isa;
}

int a8_byte_limit(const std::string& isa) { return table_of(isa).a8_byte_limit; }

// dst: [num_tiles, 64]
template <typename T, auto kMember>
void expand(const std::string& isa, Array<const uint8_t, 1> src, unsigned bits,
            Array<const T, 1> table, Array<T, 2> dst) {
  require(bits >= 2 && bits <= 8, "bits is not in the range 2..8");
  require(table.shape(0) == 256, "table must have 256 entries");
  require(dst.shape(1) == kTileCodes, "dst must be [num_tiles, 64]");
  require(src.shape(0) == dst.shape(0) * 8 * bits,
          "src must have 8 * bits bytes for each tile of dst");
  (table_of(isa).*kMember)(src.data(), dst.shape(0), bits, table.data(), dst.data());
}

// lhs: [num_taps, num_rows, 4 * num_tiles], rhs: [num_blocks, rhs_tiles, 64], dst: [num_rows, 64]
// `call` is the function of the table, without what only some functions take.
template <typename Lhs, typename Rhs, typename Dst, typename Call>
void run_gemm(Array<const Lhs, 3> lhs, Array<const Rhs, 3> rhs, Array<Dst, 2> dst, Call&& call) {
  const size_t taps = lhs.shape(0), rows = lhs.shape(1), k = lhs.shape(2);
  require(k % kTileK == 0, "the last axis of lhs must be a multiple of 4");
  require(rows >= 1, "lhs must have a row");
  require(rhs.shape(0) >= 1 && rhs.shape(0) <= kPanelBlocks, "rhs must have 1..4 blocks");
  require(rhs.shape(1) >= taps * k / kTileK && rhs.shape(2) == kTileCodes,
          "rhs must be [num_blocks, rhs_tiles, 64] with a tile for each 4 values of each tap");
  require(dst.shape(0) == rows && dst.shape(1) == kPanelN, "dst must be [num_rows, 64]");
  std::vector<const Lhs*> pointers(afpq::ceil_div(rows, kMaxRows) * taps * kMaxRows, nullptr);
  for (size_t t = 0; t < taps; ++t) {
    for (size_t r = 0; r < rows; ++r) {
      pointers[(r / kMaxRows * taps + t) * kMaxRows + r % kMaxRows] =
          lhs.data() + (t * rows + r) * k;
    }
  }
  call(pointers.data(), taps, k / kTileK, rhs.data(), rhs.shape(1), rows, rhs.shape(0));
}

template <typename Lhs, typename Rhs, typename Dst, auto kMember>
void gemm(const std::string& isa, Array<const Lhs, 3> lhs, Array<const Rhs, 3> rhs, bool accumulate,
          Array<Dst, 2> dst) {
  run_gemm(lhs, rhs, dst,
           [&](auto... args) { (table_of(isa).*kMember)(args..., accumulate, dst.data()); });
}

void gemm_bytes(const std::string& isa, Array<const uint8_t, 3> lhs, Array<const int8_t, 3> rhs,
                int limit, bool accumulate, Array<int32_t, 2> dst) {
  for (size_t i = 0; i < rhs.size(); ++i) {
    require(std::abs(int{rhs.data()[i]}) <= limit, "rhs has a number beyond limit");
  }
  run_gemm(lhs, rhs, dst, [&](auto... args) {
    table_of(isa).gemm_s32_u8_s8(args..., limit, accumulate, AfpqAhead{}, dst.data());
  });
}

// lhs: [num_rows, 4 * num_tiles], src: [num_tiles * 8 * bits], table: [256], dst: [num_rows, 64],
// of which 16 columns are used
void gemm_s32_u8_afp(const std::string& isa, Array<const uint8_t, 2> lhs,
                     Array<const uint8_t, 1> src, unsigned bits, Array<const int8_t, 1> table,
                     bool accumulate, Array<int32_t, 2> dst) {
  const size_t rows = lhs.shape(0), tiles = lhs.shape(1) / kTileK;
  require(rows >= 1 && rows <= kMaxRows && tiles >= 1 && lhs.shape(1) % kTileK == 0,
          "lhs must be [1..6, a multiple of 4]");
  require(bits >= 2 && bits <= 8 && src.shape(0) == tiles * 8 * bits && table.shape(0) == 256,
          "src must have 8 * bits bytes for each 4 columns of lhs, table 256 entries");
  require(dst.shape(0) == rows && dst.shape(1) == kPanelN, "dst must be [num_rows, 64]");
  const uint8_t* pointers[kMaxRows] = {};
  for (size_t r = 0; r < rows; ++r) pointers[r] = lhs.data() + r * lhs.shape(1);
  table_of(isa).gemm_s32_u8_afp(pointers, rows, src.data(), tiles, bits, table.data(), accumulate,
                                dst.data());
}

std::tuple<int32_t, uint32_t> range_f32(const std::string& isa, Array<const float, 1> src) {
  AfpqRange range;
  table_of(isa).range_f32(src.data(), src.shape(0), &range);
  return {range.above, range.below};
}

// dst: [num_planes, count]
void quantize_u8_f32(const std::string& isa, Array<const float, 1> src, float inverse_scale,
                     int32_t zero_point, Array<uint8_t, 2> dst, const std::string& format,
                     float scale) {
  require(dst.shape(1) == src.shape(0), "dst must be [num_planes, count]");
  const AfpqQuantize q =
      quantizer(inverse_scale, zero_point, format, scale, dst.data(), dst.shape(0), dst.shape(1));
  table_of(isa).quantize_u8_f32(src.data(), src.shape(0), &q);
}

// src: [num_channels, src_stride], dst: [num_planes, count, num_channels]
void quantize_transpose_u8_f32(const std::string& isa, Array<const float, 2> src,
                               float inverse_scale, int32_t zero_point, Array<uint8_t, 3> dst,
                               const std::string& format, float scale) {
  const size_t count = dst.shape(1), channels = dst.shape(2);
  require(src.shape(0) == channels && src.shape(1) >= count,
          "src must be [num_channels, at least count]");
  const AfpqQuantize q = quantizer(inverse_scale, zero_point, format, scale, dst.data(),
                                   dst.shape(0), count * channels);
  table_of(isa).quantize_transpose_u8_f32(src.data(), src.shape(1), channels, count, &q);
}

// dst: [count]
void quantize_s16_f32(const std::string& isa, Array<const float, 1> src, float inverse_scale,
                      int32_t zero_point, int levels, Array<int16_t, 1> dst,
                      const std::string& format, float scale) {
  require(dst.shape(0) == src.shape(0), "dst must be [count]");
  const AfpqQuantize q =
      word_quantizer(inverse_scale, zero_point, format, scale, levels, dst.data());
  table_of(isa).quantize_s16_f32(src.data(), src.shape(0), &q);
}

// src: [num_channels, src_stride], dst: [count, num_channels]
void quantize_transpose_s16_f32(const std::string& isa, Array<const float, 2> src,
                                float inverse_scale, int32_t zero_point, int levels,
                                Array<int16_t, 2> dst, const std::string& format, float scale) {
  require(src.shape(0) == dst.shape(1) && src.shape(1) >= dst.shape(0),
          "src must be [num_channels, at least count]");
  const AfpqQuantize q =
      word_quantizer(inverse_scale, zero_point, format, scale, levels, dst.data());
  table_of(isa).quantize_transpose_s16_f32(src.data(), src.shape(1), dst.shape(1), dst.shape(0),
                                           &q);
}

// src: [num_channels, src_stride], dst: [count, num_channels]
void transpose_f32(const std::string& isa, Array<const float, 2> src, Array<float, 2> dst) {
  require(src.shape(0) == dst.shape(1) && src.shape(1) >= dst.shape(0),
          "src must be [num_channels, at least count]");
  table_of(isa).transpose_f32(src.data(), src.shape(1), dst.shape(1), dst.shape(0), dst.data());
}

// sums: [rhs_planes, num_rows * lhs_planes, 64], column_sums: [rhs_planes, num_channels],
// zero_points: [num_rows]
AfpqCombine combine_of(const Array<const int32_t, 3>& sums,
                       const Array<const int32_t, 2>& column_sums,
                       const Array<const int32_t, 1>& zero_points,
                       const Array<const float, 1>& scales) {
  const size_t planes = sums.shape(0), rows = zero_points.shape(0), channels = scales.shape(0);
  require(planes == 1 || planes == 2, "sums must have 1 or 2 weight planes");
  require(rows >= 1 && (sums.shape(1) == rows || sums.shape(1) == 2 * rows),
          "sums must have 1 or 2 rows a zero point");
  require(sums.shape(2) == kPanelN, "sums must have 64 columns");
  require(column_sums.shape(0) == planes && column_sums.shape(1) == channels,
          "column_sums must be [rhs_planes, num_channels]");
  require(channels >= 1 && channels <= kPanelN, "scales must have 1..64 channels");
  AfpqCombine args = {};
  for (size_t q = 0; q < planes; ++q) {
    args.sums[q] = sums.data() + q * sums.shape(1) * kPanelN;
    args.column_sums[q] = column_sums.data() + q * channels;
  }
  args.zero_points = zero_points.data();
  args.scales = scales.data();
  args.num_rows = rows;
  args.num_channels = channels;
  args.lhs_planes = static_cast<int>(sums.shape(1) / rows);
  args.rhs_planes = static_cast<int>(planes);
  return args;
}

// dst: [num_rows, 64]
void combine_f32_s32(const std::string& isa, Array<const int32_t, 3> sums,
                     Array<const int32_t, 2> column_sums, Array<const int32_t, 1> zero_points,
                     Array<const float, 1> scales, bool accumulate, Array<float, 2> dst) {
  AfpqCombine args = combine_of(sums, column_sums, zero_points, scales);
  require(dst.shape(0) == args.num_rows && dst.shape(1) == kPanelN, "dst must be [num_rows, 64]");
  args.dst = dst.data();
  args.accumulate = accumulate;
  table_of(isa).combine_f32_s32(&args);
}

// row_scales: [num_rows], bias: [num_channels], dst: flat
AfpqStore store_of(const float* src, const Array<const float, 1>& row_scales,
                   const Array<const float, 1>& bias, float low, float high, size_t row_stride,
                   size_t channel_stride, const Array<float, 1>& dst) {
  const size_t rows = row_scales.shape(0), channels = bias.shape(0);
  require(rows >= 1 && channels >= 1 && channels <= kPanelN,
          "bias must have 1..64 channels, src at least one row");
  require(row_stride == 1 || channel_stride == 1, "one of the strides must be 1");
  require(dst.shape(0) > (rows - 1) * row_stride + (channels - 1) * channel_stride,
          "dst is too small");
  return {src,      row_scales.data(), bias.data(),    dst.data(), rows,
          channels, row_stride,        channel_stride, low,        high};
}

// src: [num_rows, 64], dst: flat
void store_f32(const std::string& isa, Array<const float, 2> src, Array<const float, 1> row_scales,
               Array<const float, 1> bias, float low, float high, size_t row_stride,
               size_t channel_stride, Array<float, 1> dst) {
  require(src.shape(1) == kPanelN && src.shape(0) == row_scales.shape(0),
          "src must be [num_rows, 64]");
  const AfpqStore args =
      store_of(src.data(), row_scales, bias, low, high, row_stride, channel_stride, dst);
  table_of(isa).store_f32(&args);
}

void finish_f32_s32(const std::string& isa, Array<const int32_t, 3> sums,
                    Array<const int32_t, 2> column_sums, Array<const int32_t, 1> zero_points,
                    Array<const float, 1> scales, Array<const float, 1> row_scales,
                    Array<const float, 1> bias, float low, float high, size_t row_stride,
                    size_t channel_stride, Array<float, 1> dst) {
  const AfpqFinishFloats args = {
      combine_of(sums, column_sums, zero_points, scales),
      store_of(nullptr, row_scales, bias, low, high, row_stride, channel_stride, dst)};
  require(args.combine.num_rows == args.store.num_rows &&
              args.combine.num_channels == args.store.num_channels,
          "there must be as many row_scales as zero_points, as many scales as biases");
  table_of(isa).finish_f32_s32(&args);
}

}  // namespace

void bind_kernels(nb::module_& module) {
  using K = AfpqKernels;
  nb::module_ m =
      module.def_submodule("kernels", "The raw kernel tables, for tests and benchmarks.");
  m.def("isa_names", isa_names, "Names of the supported tables, best first.");
  m.def("active_isa", active_isa, "The table this process runs, after AFPQ_ISA.");
  m.def("a8_byte_limit", a8_byte_limit, "Of |rhs|, for gemm_pixels_f32_u8_s8.");
  m.def("expand_s8_afp", expand<int8_t, &K::expand_s8_afp>);
  m.def("expand_s16_afp", expand<int16_t, &K::expand_s16_afp>);
  m.def("expand_f32_afp", expand<float, &K::expand_f32_afp>);
  m.def("gemm_s32_u8_s8", gemm_bytes);
  m.def("gemm_s32_u8_afp", gemm_s32_u8_afp);
  m.def("gemm_s32_s16_s16", gemm<int16_t, int16_t, int32_t, &K::gemm_s32_s16_s16>);
  m.def("gemm_f32_f32_f32", gemm<float, float, float, &K::gemm_f32_f32_f32>);
  m.def("range_f32", range_f32);
  m.def("quantize_u8_f32", quantize_u8_f32, "isa"_a, "src"_a, "inverse_scale"_a, "zero_point"_a,
        "dst"_a, "format"_a = "", "scale"_a = 0.0f);
  m.def("quantize_transpose_u8_f32", quantize_transpose_u8_f32, "isa"_a, "src"_a, "inverse_scale"_a,
        "zero_point"_a, "dst"_a, "format"_a = "", "scale"_a = 0.0f);
  m.def("quantize_s16_f32", quantize_s16_f32, "isa"_a, "src"_a, "inverse_scale"_a, "zero_point"_a,
        "levels"_a, "dst"_a, "format"_a = "", "scale"_a = 0.0f);
  m.def("quantize_transpose_s16_f32", quantize_transpose_s16_f32, "isa"_a, "src"_a,
        "inverse_scale"_a, "zero_point"_a, "levels"_a, "dst"_a, "format"_a = "", "scale"_a = 0.0f);
  m.def("transpose_f32", transpose_f32);
  m.def("combine_f32_s32", combine_f32_s32);
  m.def("store_f32", store_f32);
  m.def("finish_f32_s32", finish_f32_s32);
  bind_plane_kernels(m);
  bind_byte_kernels(m);
}
