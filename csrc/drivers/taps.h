// Where the taps of a convolution lie.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace afpq {

struct ConvShape;

// Along every axis. Offsets are in elements from the first pixel of the input, -1 in the padding;
// what they sum up to fits int32.
class TapOffsets {
 public:
  // `channels`: elements of a pixel.
  TapOffsets(const ConvShape& shape, size_t channels);

  size_t num_taps() const { return kernel_rows() * kernel_columns(); }
  // Taps are rows of a kernel, in depth and height, times its columns.
  size_t kernel_rows() const { return kernel_[0] * kernel_[1]; }
  size_t kernel_columns() const { return kernel_[2]; }
  // Pixels in a line of output, and elements from one to the next.
  size_t line() const { return line_; }
  size_t step() const { return step_; }

  // Where each row of the kernel begins for output line zy (of depth and height):
  // begins[kernel_rows()].
  void find_begins(size_t zy, int32_t* begins) const;

  // What each column of the kernel adds for pixel x of a line: [kernel_columns()].
  const int32_t* columns(size_t x) const { return &columns_[x * kernel_[2]]; }

 private:
  size_t kernel_[3];
  size_t lines_, line_, step_;  // of output
  std::vector<int32_t> planes_, rows_, columns_;
};

}  // namespace afpq
