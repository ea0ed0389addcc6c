// Convolutions with pixels in the lanes: channel planes go in, channel planes come out, and nothing
// is transposed on the way. Pixels are dwords of 2 or 4 channels; their products with 16 channels
// go to the planes of those.
#pragma once

#include "drivers/conv_paths.h"

namespace afpq {

struct PixelJob {
  const Conv& op;
  const ConvShape& shape;
  const Products products;
  const size_t steps;        // channels of a dword
  const size_t plane_bytes;  // of 16 channels, expanded
  const size_t block_bytes;  // of all planes

  PixelJob(const Conv& conv, const ConvShape& conv_shape, const Products& conv_products);
  bool words() const { return products.elements == Elements::kWords; }
  size_t groups() const { return shape.channels_in / steps; }  // of a tap
};

constexpr size_t kPixelDword = 4;
constexpr size_t kPixelLanes = 16;  // kernels.h: of those, what is read is a multiple
constexpr size_t kPixelTasks = 16;  // enough for a few threads

// A sample that is rounded to dwords, and where its outputs go.
struct PixelSample {
  const float* floats;
  const RowQuantizer& quantizer;
  float* dst;
  const float* residual;  // or null
};

// Pixels [first, first + count) of all channels to dwords, `stride` pixels from group to group.
void quantize_pixels(const PixelJob& job, const PixelSample& sample, size_t first, size_t count,
                     size_t stride, uint8_t* dst);

// The planes of a block of 16 channels.
void expand_pixel_block(const PixelJob& job, size_t block, uint8_t* dst);

// Rows of pixels, as AfpqPixels has them.
struct PixelRows {
  const uint8_t* lhs;
  const size_t* taps;
  size_t num_taps, stride;
  size_t num_pixels, pitch, size;
  size_t first;  // output
  size_t count;  // of outputs
};

// Rows times an expanded block of channels.
void multiply_pixels(const PixelJob& job, const PixelSample& sample, const PixelRows& rows,
                     size_t block, const uint8_t* rhs);

// The two ways: of 1x1, strips of pixels are rounded to panels; of taps, the sample is rounded to
// planes with padding around them, in which a tap is an offset.
void conv_pixel_panels(const PixelJob& job, const float* src, size_t batch, const ConvTarget& dst,
                       const Parallel& parallel);
void conv_pixel_planes(const PixelJob& job, const float* src, size_t batch, const ConvTarget& dst,
                       const Parallel& parallel);

// body(sample) for each sample of a batch.
template <typename Body>
void for_pixel_samples(const PixelJob& job, const float* src, size_t batch, const ConvTarget& dst,
                       const Parallel& parallel, const Body& body) {
  const ConvShape& shape = job.shape;
  for (size_t i = 0; i < batch; ++i) {
    const float* floats = src + i * shape.channels_in * shape.num_in();
    const RowQuantizer quantizer = sample_quantizer(job.op, shape, floats, parallel);
    const size_t at = i * shape.channels_out * shape.num_out();
    body(PixelSample{floats, quantizer, dst.floats + at,
                     dst.float_residual ? dst.float_residual + at : nullptr});
  }
}

}  // namespace afpq
