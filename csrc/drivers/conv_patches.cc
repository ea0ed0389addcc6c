// The path of convolutions whose channels do not fill steps of k, as those of an image: the taps of
// a pixel become one row.
//
//   for each strip of rows of output: round the rows of input that it reads, put them    parallel
//   between their padding, gather patches, multiply
//
// All that a strip needs stays in L2.
#include <algorithm>
#include <vector>

#include "core/scratch.h"
#include "drivers/conv_paths.h"
#include "drivers/patches.h"

namespace afpq {
namespace {

constexpr size_t kStripBytes = size_t{128} << 10;  // of patches

// What the strips of a convolution have in common.
struct Job {
  const Conv& op;
  const ConvShape& shape;
  const Products products;
  const OutputUnit unit;
  const size_t patch;  // elements of a row: k, in whole tiles
  const float* bias;   // [channels_out] in output units, or null
  size_t height;       // rows of output of a strip, less at the end, at one depth
  size_t per_depth;    // strips
  size_t count;        // of a sample

  Job(const Conv& conv, const ConvShape& conv_shape, size_t batch, bool to_bytes)
      : op(conv),
        shape(conv_shape),
        products(products_of(*conv.kernels, conv.rounding.mode, *conv.weight)),
        unit{to_bytes ? conv.dst_rounding.scale : 1.0f},
        patch(conv.weight->num_tiles * kTileK) {
    layer_scratch().reset(Scratch::room<float>(shape.channels_out));
    bias = in_units(op.bias, shape.channels_out, unit, &layer_scratch());
    const size_t row = shape.out[2] * patch * products.element_bytes() * products.lhs_planes;
    height = std::clamp<size_t>(kStripBytes / row, 1, shape.out[1]);
    const size_t items = batch * shape.out[0] * ceil_div(shape.out[1], height);
    height = strip_height(height, items, height * shape.out[2] * shape.channels_out * patch, 1);
    per_depth = ceil_div(shape.out[1], height);
    count = shape.out[0] * per_depth;
  }
};

// Rows [y, y + out[1]) of output at depth z of a sample; `shape` is the convolution's, with so
// many.
struct Strip {
  size_t index, z, y;
  ConvShape shape;

  Strip(const Job& job, size_t task) : shape(job.shape) {
    index = task / job.count;
    z = task % job.count / job.per_depth;
    y = task % job.per_depth * job.height;
    shape.out[0] = 1;
    shape.out[1] = std::min(job.height, shape.out[1] - y);
  }
};

// Working memory of a strip.
struct Workspace {
  uint8_t* padded[2];   // the input rows of the strip with their padding, [..][channels_in]
  uint8_t* patches[2];  // [pixels][patch]
  float* row_scales;    // [pixels], in output units
  int32_t* zero_points;

  Workspace(const Job& job, const ConvShape& strip) {
    using S = Scratch;
    const size_t element = job.products.element_bytes(), planes = job.products.lhs_planes;
    const size_t pixels = strip.num_out();
    const size_t num_padded = PaddedInput(strip).num_elements() * element + kPatchSlack;
    const size_t num_patches = pixels * job.patch * element + kPatchSlack;
    Scratch& scratch = strip_scratch();
    scratch.reset(planes * (S::room<uint8_t>(num_padded) + S::room<uint8_t>(num_patches)) +
                  S::room<float>(pixels) + S::room<int32_t>(pixels));
    for (size_t p = 0; p < planes; ++p) {
      padded[p] = scratch.take<uint8_t>(num_padded);
      patches[p] = scratch.take<uint8_t>(num_patches);
    }
    row_scales = scratch.take<float>(pixels);
    zero_points = scratch.take<int32_t>(pixels);
  }
};

// Pixels of input, the first `count` from pixel `first` of a sample on, as elements: to element
// `to` of `padded`.
void take_pixels(const Job& job, const ConvSource& src, const RowQuantizer& quantizer,
                 size_t sample, size_t first, size_t count, size_t to, const Workspace& work) {
  const AfpqKernels& kernels = *job.op.kernels;
  const size_t channels = job.shape.channels_in, stride = job.shape.num_in();
  const size_t at = sample * channels * stride;
  const bool words = job.products.elements == Elements::kWords;
  AfpqQuantize quantize = quantizer.quantize;
  quantize.words = reinterpret_cast<int16_t*>(work.padded[0]) + to;
  for (int p = 0; p < job.products.lhs_planes; ++p) quantize.planes[p] = work.padded[p] + to;
  if (src.bytes) {
    const uint8_t* from = src.bytes + at + first * channels;
    if (words) {
      std::copy(from, from + count * channels, quantize.words);
    } else {
      std::copy(from, from + count * channels, quantize.planes[0]);
    }
  } else if (job.products.elements == Elements::kFloats) {
    kernels.transpose_f32(src.floats + at + first, stride, channels, count,
                          reinterpret_cast<float*>(work.padded[0]) + to);
  } else {
    (words ? kernels.quantize_transpose_s16_f32 : kernels.quantize_transpose_u8_f32)(
        src.floats + at + first, stride, channels, count, &quantize);
  }
}

// The rows of a strip. padding: an element of each plane. T: uint8_t, int16_t or float.
template <typename T>
void make_rows(const Job& job, const ConvSource& src, const RowQuantizer& quantizer,
               const Strip& strip, const T (&padding)[2], const Workspace& work) {
  const ConvShape& shape = job.shape;
  const PaddedInput input(strip.shape);
  const size_t width = input.extent[2], left = std::min(shape.pads[2], width);
  const size_t count = std::min(shape.in[2], width - left), channels = shape.channels_in;
  const auto fill = [&](size_t begin, size_t end) {  // pixels
    for (int p = 0; p < job.products.lhs_planes; ++p) {
      T* plane = reinterpret_cast<T*>(work.padded[p]);
      std::fill(plane + begin * channels, plane + end * channels, padding[p]);
    }
  };
  size_t line = 0;
  for (size_t i = 0; i < input.extent[0]; ++i) {
    const size_t z = strip.z * shape.strides[0] + i - shape.pads[0];
    for (size_t j = 0; j < input.extent[1]; ++j, line += width) {
      const size_t y = strip.y * shape.strides[1] + j - shape.pads[1];
      if (z >= shape.in[0] || y >= shape.in[1]) {  // or below 0
        fill(line, line + width);
        continue;
      }
      fill(line, line + left);
      take_pixels(job, src, quantizer, strip.index, (z * shape.in[1] + y) * shape.in[2], count,
                  (line + left) * channels, work);
      fill(line + left + count, line + width);
    }
  }
  for (int p = 0; p < job.products.lhs_planes; ++p) {
    gather_patches(strip.shape, reinterpret_cast<const T*>(work.padded[p]), job.patch,
                   reinterpret_cast<T*>(work.patches[p]));
  }
}

void run_strip(const Job& job, const ConvSource& src, const RowQuantizer& quantizer,
               const Strip& strip, const ConvTarget& dst) {
  const Workspace work(job, strip.shape);
  const int32_t zero = quantizer.zero_element(job.products.elements);
  switch (job.products.elements) {
    case Elements::kFloats:
      make_rows<float>(job, src, quantizer, strip, {0.0f, 0.0f}, work);
      break;
    case Elements::kWords:
      make_rows<int16_t>(job, src, quantizer, strip, {static_cast<int16_t>(zero), 0}, work);
      break;
    case Elements::kBytes:
      make_rows<uint8_t>(job, src, quantizer, strip,
                         {quantizer.zero_byte(0), quantizer.zero_byte(1)}, work);
  }
  const ConvShape& shape = job.shape;
  const size_t pixels = strip.shape.num_out();
  std::fill(work.row_scales, work.row_scales + pixels, job.unit(quantizer.scale));
  std::fill(work.zero_points, work.zero_points + pixels, zero);
  GemmJob product = conv_job(job.op, shape, job.products, dst,
                             {strip.index, (strip.z * shape.out[1] + strip.y) * shape.out[2],
                              pixels, 0, shape.channels_out});
  for (int p = 0; p < job.products.lhs_planes; ++p) product.lhs.planes[p] = work.patches[p];
  product.lhs.stride = job.patch;
  product.row_scales = work.row_scales;
  product.zero_points = work.zero_points;
  product.bias = job.bias;
  product.num_tasks = 1;
  gemm(product, serial());
}

}  // namespace

void conv_patches(const Conv& op, const ConvShape& shape, const ConvSource& src, size_t batch,
                  const ConvTarget& dst, const Parallel& parallel) {
  const Job job(op, shape, batch, dst.bytes != nullptr);
  // Floats stay what they are.
  std::vector<RowQuantizer> quantizers(batch);
  const size_t size = shape.channels_in * shape.num_in();
  for (size_t i = 0; i < batch && job.products.elements != Elements::kFloats; ++i) {
    quantizers[i] = src.bytes ? static_quantizer(op.rounding)
                              : sample_quantizer(op, shape, src.floats + i * size, parallel);
  }
  parallel_for(parallel, batch * job.count, [&](size_t task) {
    const Strip strip(job, task);
    run_strip(job, src, quantizers[strip.index], strip, dst);
  });
}

}  // namespace afpq
