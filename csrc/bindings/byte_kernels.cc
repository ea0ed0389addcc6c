// The kernels behind layers that pass bytes to each other, for tests and benchmarks.
#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/kernel_arguments.h"

using namespace nb::literals;

namespace {

using MaybeBytes = std::optional<Array<const uint8_t, 2>>;

// lhs: [num_taps, lines, columns, 16 * num_blocks], rhs: [num_blocks, rhs_tiles, 64],
// dst: [lines * columns, 64]
void depthwise_s32_u8_s16(const std::string& isa, Array<const uint8_t, 4> lhs,
                          Array<const int16_t, 3> rhs, Array<int32_t, 2> dst) {
  const size_t taps = lhs.shape(0), lines = lhs.shape(1), columns = lhs.shape(2);
  const size_t step = lhs.shape(3), blocks = rhs.shape(0);
  require(blocks >= 1 && blocks <= kPanelBlocks && step >= blocks * kTileN,
          "lhs must have 16 columns for each of the 1..4 blocks of rhs");
  require(rhs.shape(1) * kTileK >= taps && rhs.shape(2) == kTileCodes,
          "rhs must be [num_blocks, rhs_tiles, 64] with a tile for each 4 taps");
  require(dst.shape(0) == lines * columns && dst.shape(1) == kPanelN,
          "dst must be [lines * columns, 64]");
  std::vector<const uint8_t*> pointers(taps, nullptr);
  for (size_t t = 0; t < taps; ++t) pointers[t] = lhs.data() + t * lines * columns * step;
  table_of(isa).depthwise_s32_u8_s16(pointers.data(), step, columns * step, taps, rhs.data(),
                                     rhs.shape(1), lines, columns, blocks, dst.data());
}

// What all that follow have in common; residual: [num_rows, at least num_channels].
AfpqStoreBytes store_of(size_t rows, const Array<const float, 1>& bias, const MaybeBytes& residual,
                        int32_t residual_zero, float residual_scale, float low, float high) {
  const size_t channels = bias.shape(0);
  require(rows >= 1 && channels >= 1 && channels <= kPanelN,
          "bias must have 1..64 channels, and there must be a row");
  require(!residual || (residual->shape(0) == rows && residual->shape(1) >= channels),
          "residual must be [num_rows, at least num_channels]");
  AfpqStoreBytes args = {};
  args.bias = bias.data();
  args.residual = residual ? residual->data() : nullptr;
  args.residual_zero = residual_zero;
  args.residual_scale = residual_scale;
  args.num_rows = rows;
  args.num_channels = channels;
  args.stride = residual ? residual->shape(1) : 0;
  args.low = low;
  args.high = high;
  return args;
}

// dst: [num_rows, at least num_channels], as wide as the residual
void set_dst(const Array<uint8_t, 2>& dst, const MaybeBytes& residual, AfpqStoreBytes* args) {
  require(dst.shape(0) == args->num_rows && dst.shape(1) >= args->num_channels,
          "dst must be [num_rows, at least num_channels]");
  require(!residual || residual->shape(1) == dst.shape(1), "residual must be as wide as dst");
  args->dst = dst.data();
  args->stride = dst.shape(1);
}

// src: [num_rows, 64]
void store_u8_f32(const std::string& isa, Array<const float, 2> src,
                  Array<const float, 1> row_scales, Array<const float, 1> bias, MaybeBytes residual,
                  int32_t residual_zero, float residual_scale, float low, float high,
                  const std::string& format, float scale, Array<uint8_t, 2> dst) {
  require(src.shape(1) == kPanelN && row_scales.shape(0) == src.shape(0),
          "src must be [num_rows, 64], row_scales [num_rows]");
  AfpqStoreBytes args =
      store_of(src.shape(0), bias, residual, residual_zero, residual_scale, low, high);
  const AfpqQuantize q = quantizer(0, 0, format, scale, nullptr, 1, 0);
  args.quantize = &q;
  args.src = src.data();
  args.row_scales = row_scales.data();
  set_dst(dst, residual, &args);
  table_of(isa).store_u8_f32(&args);
}

// src and dst: [num_rows, 64]
void store_residual_f32(const std::string& isa, Array<const float, 2> src,
                        Array<const float, 1> row_scales, Array<const float, 1> bias,
                        MaybeBytes residual, int32_t residual_zero, float residual_scale, float low,
                        float high, Array<float, 2> dst) {
  require(src.shape(1) == kPanelN && dst.shape(1) == kPanelN && dst.shape(0) == src.shape(0) &&
              row_scales.shape(0) == src.shape(0),
          "src and dst must be [num_rows, 64], row_scales [num_rows]");
  AfpqStoreBytes args =
      store_of(src.shape(0), bias, residual, residual_zero, residual_scale, low, high);
  const AfpqQuantize q = {};
  args.quantize = &q;
  args.src = src.data();
  args.row_scales = row_scales.data();
  args.floats = dst.data();
  table_of(isa).store_u8_f32(&args);
}

// sums: [rhs_planes, num_rows, 64], column_sums: [rhs_planes, num_channels]
void finish_u8_s32(const std::string& isa, Array<const int32_t, 3> sums,
                   Array<const int32_t, 2> column_sums, int32_t zero_point,
                   Array<const float, 1> scales, float row_scale, Array<const float, 1> bias,
                   MaybeBytes residual, int32_t residual_zero, float residual_scale, float low,
                   float high, const std::string& format, float scale, Array<uint8_t, 2> dst) {
  const size_t planes = sums.shape(0), rows = sums.shape(1), channels = bias.shape(0);
  require((planes == 1 || planes == 2) && sums.shape(2) == kPanelN,
          "sums must be [1 or 2, num_rows, 64]");
  require(column_sums.shape(0) == planes && column_sums.shape(1) == channels &&
              scales.shape(0) == channels,
          "column_sums must be [rhs_planes, num_channels], scales [num_channels]");
  AfpqFinish args = {};
  args.store = store_of(rows, bias, residual, residual_zero, residual_scale, low, high);
  const AfpqQuantize q = quantizer(0, 0, format, scale, nullptr, 1, 0);
  args.store.quantize = &q;
  args.store.row_scales = &row_scale;
  set_dst(dst, residual, &args.store);
  for (size_t p = 0; p < planes; ++p) {
    args.combine.sums[p] = sums.data() + p * rows * kPanelN;
    args.combine.column_sums[p] = column_sums.data() + p * channels;
  }
  args.combine.zero_points = &zero_point;
  args.combine.scales = scales.data();
  args.combine.lhs_planes = 1;
  args.combine.rhs_planes = static_cast<int>(planes);
  table_of(isa).finish_u8_s32(&args);
}

}  // namespace

void bind_byte_kernels(nb::module_& m) {
  m.def("depthwise_s32_u8_s16", depthwise_s32_u8_s16);
  m.def("store_u8_f32", store_u8_f32, "isa"_a, "src"_a, "row_scales"_a, "bias"_a,
        "residual"_a.none(), "residual_zero"_a, "residual_scale"_a, "low"_a, "high"_a, "format"_a,
        "scale"_a, "dst"_a);
  m.def("store_residual_f32", store_residual_f32, "isa"_a, "src"_a, "row_scales"_a, "bias"_a,
        "residual"_a.none(), "residual_zero"_a, "residual_scale"_a, "low"_a, "high"_a, "dst"_a);
  m.def("finish_u8_s32", finish_u8_s32, "isa"_a, "sums"_a, "column_sums"_a, "zero_point"_a,
        "scales"_a, "row_scale"_a, "bias"_a, "residual"_a.none(), "residual_zero"_a,
        "residual_scale"_a, "low"_a, "high"_a, "format"_a, "scale"_a, "dst"_a);
}
