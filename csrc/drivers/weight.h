// A packed weight as drivers see it: the stored bytes in place, plus what is derived from them once
// at load.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "core/format.h"
#include "kernels/kernels.h"

namespace afpq {

// A stretch of k with sums of its own: a scale group, or a part short enough for int32 sums. Bounds
// in tiles of 4 k.
struct Segment {
  size_t begin;
  size_t end;
  size_t group;  // index of the row of scales
};

struct PackedWeight {
  Format format;
  FormatTables tables;
  size_t n = 0;
  size_t k = 0;
  const uint8_t* data = nullptr;  // packed_bytes(n, k, bits), not owned

  size_t num_blocks = 0;          // of 16 channels
  size_t num_tiles = 0;           // of 4 k, in each block
  size_t tile_bytes = 0;          // 8 * bits
  size_t group_size = 0;          // steps of k that share a row of scales; 0: all
  size_t num_groups = 1;          // rows of scales
  std::vector<float> scales;      // [num_groups][16 * num_blocks], zero beyond n
  std::vector<Segment> segments;  // cover [0, num_tiles)
  std::vector<int32_t>
      column_sums[2];  // [segment][16 * num_blocks] of I (byte) or of each plane (pair)
  std::vector<int32_t> joined_sums;  // the same of I itself, if a pair
  int limits[2] = {0, 0};            // the largest magnitude in each plane
  int32_t sides[2] = {0, 0};  // the largest sum of one sign, see fits_words, or a bound of it
  // Whether rows of words may take the place of byte planes: in no channel, segment and plane do
  // the numbers of one sign add up to more than 32767. For then, whatever the zero point,
  //   a16    |sum (q - zero) * plane| <= 65535 * 32767 < 2^31, and the sums that byte planes have
  //          before they become float are below 2^24, so that all floats on the way are exact but
  //          the last one: it is the same sum, rounded once
  //   a8     the same holds of |sum (q - zero) * I| <= 255 * (256 * 32767 + 32767) < 2^31
  bool fits_words = false;
  int32_t joined_side = 0;  // of a pair: the largest sum of numbers I of one sign, or a bound of it
  // Whether that is at most 32767. Then |sum (q - zero) * I| of a16 is below 2^31, and becomes
  // float as it is, however it was added up: one rounding in place of one for each plane.
  bool fits_joined = false;

  const uint8_t* block(size_t index) const { return data + index * num_tiles * tile_bytes; }
};

// `scales` is [num_groups][n] (num_groups > 1 with group_size, a multiple of 4), [n] or [1].
// Segments end at multiples of `segment_multiple` tiles (the tiles of a convolution's tap). Column
// sums are only made for integer execution, and fits_words is only true where `kernels` prefers
// words.
void load_weight(const AfpqKernels& kernels, const Format& format, const uint8_t* data, size_t n,
                 size_t k, const float* scales, size_t num_scales, size_t group_size,
                 size_t segment_multiple, bool integer_sums, PackedWeight* weight);

// Makes column_sums, sides and joined_side, and what follows from them, of a weight that was loaded
// without.
void sum_columns(const AfpqKernels& kernels, PackedWeight* weight);

// What follows from column_sums, sides and joined_side that were made before.
void use_sums(const AfpqKernels& kernels, PackedWeight* weight);

// One row of the matrix as floats I * scale: dst[k].
void decode_row(const PackedWeight& weight, size_t row, float* dst);

}  // namespace afpq
