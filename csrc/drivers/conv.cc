#include "drivers/conv.h"

#include <algorithm>
#include <cstring>

#include "core/scratch.h"

namespace afpq {
namespace {

constexpr size_t kTaskElements = size_t{1} << 15;

// How taps find their rows.
enum class Taps {
  kDirect,   // 1x1, stride 1, no padding: pixel r is row r
  kOffsets,  // taps are read in place
  kPatches,  // taps of a pixel are copied into one row
};

Taps taps_of(const ConvShape& shape) {
  if (shape.group_in() % kTileK != 0) return Taps::kPatches;
  for (int axis = 0; axis < 3; ++axis) {
    if (shape.kernel[axis] != 1 || shape.strides[axis] != 1 || shape.in[axis] != shape.out[axis] ||
        shape.pads[axis]) {
      return Taps::kOffsets;
    }
  }
  return Taps::kDirect;
}

// Index of the input pixel under (tap, output pixel) or -1 in the padding:
// pixels[num_out][num_taps] times `scale`.
void tap_offsets(const ConvShape& shape, size_t scale, int32_t* offsets) {
  const auto position = [&](int axis, size_t out, size_t tap) -> ptrdiff_t {
    const ptrdiff_t at =
        static_cast<ptrdiff_t>(out * shape.strides[axis] + tap * shape.dilations[axis]) -
        static_cast<ptrdiff_t>(shape.pads[axis]);
    return at < 0 || at >= static_cast<ptrdiff_t>(shape.in[axis]) ? -1 : at;
  };
  for (size_t z = 0; z < shape.out[0]; ++z) {
    for (size_t y = 0; y < shape.out[1]; ++y) {
      for (size_t x = 0; x < shape.out[2]; ++x) {
        for (size_t kz = 0; kz < shape.kernel[0]; ++kz) {
          const ptrdiff_t iz = position(0, z, kz);
          for (size_t ky = 0; ky < shape.kernel[1]; ++ky) {
            const ptrdiff_t iy = position(1, y, ky);
            for (size_t kx = 0; kx < shape.kernel[2]; ++kx) {
              const ptrdiff_t ix = position(2, x, kx);
              const ptrdiff_t pixel = (iz * static_cast<ptrdiff_t>(shape.in[1]) + iy) *
                                          static_cast<ptrdiff_t>(shape.in[2]) +
                                      ix;
              *offsets++ = iz < 0 || iy < 0 || ix < 0 ? -1 : static_cast<int32_t>(pixel * scale);
            }
          }
        }
      }
    }
  }
}

// Copies the taps of each output pixel into one row: rows[num_out][padded].
template <typename T>
void gather_patches(const ConvShape& shape, const T* pixels, const int32_t* offsets, T padding,
                    size_t padded, const Parallel& parallel, T* rows) {
  const size_t taps = shape.num_taps(), channels = shape.channels_in;
  const size_t step = std::max<size_t>(1, kTaskElements / padded);
  parallel_for(parallel, ceil_div(shape.num_out(), step), [&](size_t task) {
    for (size_t r = task * step; r < std::min(shape.num_out(), (task + 1) * step); ++r) {
      T* row = rows + r * padded;
      for (size_t tap = 0; tap < taps; ++tap, row += channels) {
        const int32_t offset = offsets[r * taps + tap];
        if (offset < 0) {
          std::fill(row, row + channels, padding);
        } else {
          std::copy(pixels + offset, pixels + offset + channels, row);
        }
      }
      std::fill(row, rows + (r + 1) * padded, T{0});
    }
  });
}

RowQuantizer quantize_sample(const Conv& op, const ConvShape& shape, const float* src,
                             const Products& products, uint8_t* const* pixels,
                             const Parallel& parallel) {
  const size_t count = shape.num_in(), channels = shape.channels_in;
  const RowQuantizer quantizer = sample_quantizer(op, shape, src, parallel);
  const auto transpose = products.elements == Elements::kWords
                             ? op.kernels->quantize_transpose_s16_f32
                             : op.kernels->quantize_transpose_u8_f32;
  const size_t step = std::max<size_t>(16, kTaskElements / channels / 16 * 16);
  parallel_for(parallel, ceil_div(count, step), [&](size_t task) {
    AfpqQuantize quantize = quantizer.quantize;
    const size_t begin = task * step;
    for (int p = 0; p < products.lhs_planes; ++p) quantize.planes[p] = pixels[p] + begin * channels;
    quantize.words = reinterpret_cast<int16_t*>(pixels[0]) + begin * channels;
    transpose(src + begin, count, channels, std::min(step, count - begin), &quantize);
  });
  return quantizer;
}

// The buffers of one sample and the job that reads them: planes of elements.
struct Sample {
  uint8_t* pixels[2] = {nullptr, nullptr};   // [num_in][channels]
  uint8_t* patches[2] = {nullptr, nullptr};  // [num_out][padded]
  uint8_t* padding[2] = {nullptr, nullptr};  // [channels of a group]
  int32_t* offsets = nullptr;
  float* row_scales = nullptr;  // [num_out]
  int32_t* zero_points = nullptr;
};

Sample allocate_sample(const ConvShape& shape, Taps taps, const Products& products, size_t padded) {
  const size_t element = products.element_bytes();
  const size_t pixels = shape.num_in() * shape.channels_in * element;
  const size_t padding = shape.group_in() * element;
  const size_t patches = taps == Taps::kPatches ? shape.num_out() * padded * element : 0;
  const size_t offsets = taps == Taps::kDirect ? 0 : shape.num_out() * shape.num_taps();
  using S = Scratch;
  Scratch& scratch = layer_scratch();
  scratch.reset(products.lhs_planes * (S::room<uint8_t>(pixels) + S::room<uint8_t>(patches) +
                                       S::room<uint8_t>(padding)) +
                S::room<int32_t>(offsets) + S::room<float>(shape.num_out()) +
                S::room<int32_t>(shape.num_out()));
  Sample sample;
  for (int p = 0; p < products.lhs_planes; ++p) {
    sample.pixels[p] = scratch.take<uint8_t>(pixels);
    sample.patches[p] = scratch.take<uint8_t>(patches);
    sample.padding[p] = scratch.take<uint8_t>(padding);
  }
  sample.offsets = scratch.take<int32_t>(offsets);
  sample.row_scales = scratch.take<float>(shape.num_out());
  sample.zero_points = scratch.take<int32_t>(shape.num_out());
  return sample;
}

// What taps in the padding read, and patches where there are some. T: uint8_t, int16_t or float.
template <typename T>
void fill_padding(const ConvShape& shape, Taps taps, int plane, T padding, size_t padded,
                  const Sample& sample, const Parallel& parallel) {
  T* row = reinterpret_cast<T*>(sample.padding[plane]);
  std::fill(row, row + shape.group_in(), padding);
  if (taps != Taps::kPatches) return;
  gather_patches(shape, reinterpret_cast<const T*>(sample.pixels[plane]), sample.offsets, padding,
                 padded, parallel, reinterpret_cast<T*>(sample.patches[plane]));
}

void fill_rows(const Conv& op, const ConvShape& shape, const float* src, Taps taps,
               const Products& products, size_t padded, const Sample& sample,
               const Parallel& parallel) {
  if (products.elements == Elements::kFloats) {
    op.kernels->transpose_f32(src, shape.num_in(), shape.channels_in, shape.num_in(),
                              reinterpret_cast<float*>(sample.pixels[0]));
    std::fill(sample.row_scales, sample.row_scales + shape.num_out(), 1.0f);
    fill_padding(shape, taps, 0, 0.0f, padded, sample, parallel);
    return;
  }
  const RowQuantizer quantizer = quantize_sample(op, shape, src, products, sample.pixels, parallel);
  const int32_t zero = quantizer.zero_element(products.elements);
  std::fill(sample.row_scales, sample.row_scales + shape.num_out(), quantizer.scale);
  std::fill(sample.zero_points, sample.zero_points + shape.num_out(), zero);
  if (products.elements == Elements::kWords) {
    fill_padding(shape, taps, 0, static_cast<int16_t>(zero), padded, sample, parallel);
    return;
  }
  for (int p = 0; p < products.lhs_planes; ++p) {
    const bool high = p == 0 && products.lhs_planes == 2;
    fill_padding(shape, taps, p, static_cast<uint8_t>(high ? zero >> 8 : zero & 255), padded,
                 sample, parallel);
  }
}

LhsRows rows_of_group(const ConvShape& shape, Taps taps, const Products& products, size_t padded,
                      size_t group, const Sample& sample) {
  LhsRows rows;
  const bool patches = taps == Taps::kPatches;
  for (int p = 0; p < products.lhs_planes; ++p) {
    rows.planes[p] = patches
                         ? sample.patches[p]
                         : sample.pixels[p] + group * shape.group_in() * products.element_bytes();
    rows.padding[p] = sample.padding[p];
  }
  rows.stride = patches ? padded : shape.channels_in;
  if (taps == Taps::kOffsets) {
    rows.offsets = sample.offsets;
    rows.num_taps = shape.num_taps();
  }
  return rows;
}

void conv_gemm(const Conv& op, const ConvShape& shape, const float* src, size_t batch, float* dst,
               const Parallel& parallel) {
  const Taps taps = taps_of(shape);
  const Products products = products_of(*op.kernels, op.rounding.mode, *op.weight);
  if (conv_fits_pixels(op, shape, products))
    return conv_pixels(op, shape, products, src, batch, dst, parallel);
  const size_t padded = op.weight->num_tiles * kTileK;
  const Sample sample = allocate_sample(shape, taps, products, padded);
  if (taps != Taps::kDirect) tap_offsets(shape, shape.channels_in, sample.offsets);
  for (size_t i = 0; i < batch; ++i) {
    fill_rows(op, shape, src + i * shape.channels_in * shape.num_in(), taps, products, padded,
              sample, parallel);
    for (size_t group = 0; group < shape.groups; ++group) {
      GemmJob job;
      job.kernels = op.kernels;
      job.weight = op.weight;
      job.products = products;
      job.lhs = rows_of_group(shape, taps, products, padded, group, sample);
      job.row_scales = sample.row_scales;
      job.zero_points = sample.zero_points;
      job.bias = op.bias;
      job.low = op.low;
      job.high = op.high;
      job.dst = dst + (i * shape.channels_out + group * shape.group_out()) * shape.num_out();
      job.row_stride = 1;
      job.channel_stride = shape.num_out();
      job.m = shape.num_out();
      job.first_block = group * shape.group_out() / kTileN;
      job.n = shape.group_out();
      gemm(job, parallel);
    }
  }
}

}  // namespace

RowQuantizer sample_quantizer(const Conv& op, const ConvShape& shape, const float* src,
                              const Parallel& parallel) {
  const size_t total = shape.num_in() * shape.channels_in, parts = ceil_div(total, kTaskElements);
  std::vector<float> lows(parts), highs(parts);
  std::vector<int> finite(parts);
  parallel_for(parallel, parts, [&](size_t part) {
    const size_t begin = part * kTaskElements;
    op.kernels->range_f32(src + begin, std::min(kTaskElements, total - begin), &lows[part],
                          &highs[part], &finite[part]);
  });
  return row_quantizer(op.rounding, *std::min_element(lows.begin(), lows.end()),
                       *std::max_element(highs.begin(), highs.end()),
                       *std::min_element(finite.begin(), finite.end()) == 1);
}

void conv(const Conv& op, const ConvShape& shape, const float* src, size_t batch, float* dst,
          const Parallel& parallel) {
  if (shape.num_out() == 0 || batch == 0) return;
  if (conv_is_planar(shape)) {
    conv_planar(op, shape, src, batch, dst, parallel);
  } else {
    conv_gemm(op, shape, src, batch, dst, parallel);
  }
}

}  // namespace afpq
