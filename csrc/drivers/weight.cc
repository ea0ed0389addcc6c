#include "drivers/weight.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace afpq {
namespace {

// 65536 steps of 255 * 128 stay below 2^31.
constexpr size_t kMaxSegmentTiles = 65536 / kTileK;
// See PackedWeight::fits_words.
constexpr int32_t kMaxSide = 32767;

std::vector<Segment> make_segments(size_t num_tiles, size_t group_tiles, size_t multiple) {
  const size_t stretch = group_tiles ? group_tiles : num_tiles;
  const size_t step = std::max(kMaxSegmentTiles / multiple * multiple, multiple);
  std::vector<Segment> segments;
  for (size_t group = 0, begin = 0; begin < num_tiles; ++group) {
    const size_t group_end = std::min(begin + stretch, num_tiles);
    for (; begin < group_end; begin = segments.back().end) {
      segments.push_back({begin, std::min(begin + step, group_end), group});
    }
  }
  return segments;
}

// Sums of table[code] of every channel over every segment: [segment][16 * num_blocks].
std::vector<int32_t> sum_table(const AfpqKernels& kernels, const PackedWeight& weight,
                               const int8_t* table) {
  const size_t width = weight.num_blocks * kTileN;
  std::vector<uint8_t> ones(weight.num_tiles * kTileK, 1);
  std::vector<int8_t> expanded(weight.num_tiles * kTileCodes);
  std::vector<int32_t> result(weight.segments.size() * width, 0);
  int32_t sums[kPanelN];
  for (size_t block = 0; block < weight.num_blocks; ++block) {
    kernels.expand_s8_afp(weight.block(block), weight.num_tiles, weight.format.bits(), table,
                          expanded.data());
    for (size_t s = 0; s < weight.segments.size(); ++s) {
      const Segment& segment = weight.segments[s];
      const uint8_t* lhs[kMaxRows] = {ones.data()};
      kernels.gemm_s32_u8_s8(lhs, 1, segment.end - segment.begin,
                             expanded.data() + segment.begin * kTileCodes, weight.num_tiles, 1, 1,
                             128, 0, {}, sums);
      std::copy(sums, sums + kTileN, result.begin() + s * width + block * kTileN);
    }
  }
  return result;
}

// What numbers up to `limit` can add up to over a segment.
size_t bound_of_sums(const PackedWeight& weight, size_t limit) {
  size_t longest = 0;
  for (const Segment& segment : weight.segments)
    longest = std::max(longest, segment.end - segment.begin);
  return longest * kTileK * limit;
}

// The largest sum of numbers of one sign over a channel and segment of a plane; at most 32767 if
// that is clear without adding up.
int32_t largest_side(const AfpqKernels& kernels, const PackedWeight& weight, int plane,
                     const int8_t* table) {
  const size_t bound = bound_of_sums(weight, weight.limits[plane]);
  if (bound <= size_t{kMaxSide}) return static_cast<int32_t>(bound);
  int8_t above[256];
  for (size_t i = 0; i < 256; ++i) above[i] = std::max<int8_t>(table[i], 0);
  const std::vector<int32_t> sides = sum_table(kernels, weight, above);
  const std::vector<int32_t>& sums = weight.column_sums[plane];
  int32_t largest = 0;
  for (size_t i = 0; i < sides.size(); ++i)
    largest = std::max({largest, sides[i], sides[i] - sums[i]});
  return largest;
}

// The same of the numbers I of a pair.
int32_t largest_joined_side(const AfpqKernels& kernels, const PackedWeight& weight) {
  const size_t bound = bound_of_sums(weight, weight.format.max_integer());
  if (bound <= size_t{kMaxSide}) return static_cast<int32_t>(bound);
  int8_t above[2][256];  // the planes of I above zero
  for (size_t i = 0; i < 256; ++i) {
    const bool positive = weight.tables.joined[i] > 0;
    above[0][i] = positive ? weight.tables.low[i] : int8_t{0};
    above[1][i] = positive ? weight.tables.high[i] : int8_t{0};
  }
  const std::vector<int32_t> low = sum_table(kernels, weight, above[0]);
  const std::vector<int32_t> high = sum_table(kernels, weight, above[1]);
  int64_t largest = 0;
  for (size_t i = 0; i < low.size(); ++i) {
    const int64_t side = int64_t{256} * high[i] + low[i];
    const int64_t sum = int64_t{256} * weight.column_sums[1][i] + weight.column_sums[0][i];
    largest = std::max({largest, side, side - sum});
  }
  return static_cast<int32_t>(std::min<int64_t>(largest, std::numeric_limits<int32_t>::max()));
}

const int8_t* table_of(const PackedWeight& weight, int plane) {
  return plane == 0 ? weight.tables.low : weight.tables.high;
}

}  // namespace

void sum_columns(const AfpqKernels& kernels, PackedWeight* weight) {
  for (int plane = 0; plane < weight->format.num_planes(); ++plane) {
    const int8_t* table = table_of(*weight, plane);
    weight->column_sums[plane] = sum_table(kernels, *weight, table);
    weight->sides[plane] = largest_side(kernels, *weight, plane, table);
  }
  if (weight->format.num_planes() == 2) weight->joined_side = largest_joined_side(kernels, *weight);
  use_sums(kernels, weight);
}

void use_sums(const AfpqKernels& kernels, PackedWeight* weight) {
  const int planes = weight->format.num_planes();
  weight->fits_words = (kernels.a16_as_words || kernels.a8_byte_limit < 128) && planes > 0;
  for (int plane = 0; plane < planes; ++plane) {
    weight->fits_words = weight->fits_words && weight->sides[plane] <= kMaxSide;
  }
  if (planes < 2) return;
  weight->fits_joined = weight->joined_side <= kMaxSide;
  weight->joined_sums = weight->column_sums[0];
  for (size_t i = 0; i < weight->joined_sums.size(); ++i)
    weight->joined_sums[i] += 256 * weight->column_sums[1][i];
}

void load_weight(const AfpqKernels& kernels, const Format& format, const uint8_t* data, size_t n,
                 size_t k, const float* scales, size_t num_scales, size_t group_size,
                 size_t segment_multiple, bool integer_sums, PackedWeight* weight) {
  weight->format = format;
  fill_tables(format, &weight->tables);
  weight->n = n;
  weight->k = k;
  weight->data = data;
  weight->num_blocks = ceil_div(n, kTileN);
  weight->num_tiles = ceil_div(k, kTileK);
  weight->tile_bytes = 8 * format.bits();
  weight->group_size = group_size;
  weight->num_groups = group_size ? ceil_div(k, group_size) : 1;
  const size_t width = weight->num_blocks * kTileN;
  weight->scales.assign(weight->num_groups * width, 0.0f);
  for (size_t group = 0; group < weight->num_groups; ++group) {
    for (size_t channel = 0; channel < n; ++channel) {
      weight->scales[group * width + channel] =
          num_scales == 1 ? scales[0] : scales[group * n + channel];
    }
  }
  weight->segments = make_segments(weight->num_tiles, group_size / kTileK, segment_multiple);
  for (int plane = 0; plane < format.num_planes(); ++plane) {
    const int8_t* table = table_of(*weight, plane);
    for (size_t i = 0; i < 256; ++i)
      weight->limits[plane] = std::max(weight->limits[plane], std::abs(int{table[i]}));
  }
  if (integer_sums) sum_columns(kernels, weight);
}

namespace {

// At least `num_bytes` bytes from src on, the first the lowest; none beyond `end`.
uint64_t load_codes(const uint8_t* src, size_t num_bytes, const uint8_t* end) {
  uint64_t codes = 0;
  if (end - src >= static_cast<ptrdiff_t>(sizeof codes)) {
    std::memcpy(&codes, src, sizeof codes);
  } else {
    std::memcpy(&codes, src, num_bytes);
  }
  return codes;
}

}  // namespace

void decode_row(const PackedWeight& weight, size_t row, float* dst) {
  // A tile holds 4 codes of each channel next to each other, which begin at a byte or in its
  // middle.
  const unsigned bits = weight.format.bits();
  const size_t at = row % kTileN * kTileK * bits, shift = at % 8;
  const size_t num_bytes = ceil_div(shift + kTileK * bits, 8), width = weight.num_blocks * kTileN;
  const uint8_t *src = weight.block(row / kTileN) + at / 8, *end = weight.block(weight.num_blocks);
  const float* values = weight.tables.value;
  const size_t size = weight.group_size ? weight.group_size : weight.k;
  for (size_t begin = 0; begin < weight.k; begin += size) {
    const float scale = weight.scales[begin / size * width + row];
    const size_t last = std::min(begin + size, weight.k);
    for (size_t step = begin; step < last; step += kTileK, src += weight.tile_bytes) {
      const uint64_t codes = load_codes(src, num_bytes, end) >> shift;
      const auto decode = [&](size_t count) {
        for (size_t i = 0; i < count; ++i)
          dst[step + i] = values[codes >> (i * bits) & 255] * scale;
      };
      last - step < kTileK ? decode(last - step) : decode(kTileK);
    }
  }
}

}  // namespace afpq
