// The adaptive-float formats in C++: codes to integers. The definition is afpq/formats.py; tests
// prove them equal.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace afpq {

struct Format {
  int exponent_bits = 0;
  int mantissa_bits = 0;
  bool is_signed = true;

  unsigned bits() const { return (is_signed ? 1 : 0) + exponent_bits + mantissa_bits; }
  // +-I of a code below 2^bits.
  int64_t integer(unsigned code) const;
  int64_t max_integer() const;
  // How kernels execute the format: planes of signed bytes (1 or 2), or 0 for the wide class (float
  // lanes).
  int num_planes() const;
};

// Reads "e2m1" or "ue2m5" with 2..8 bits; false when the text is not such a format.
bool parse_format(const char* text, Format* format);

// Whether activations can be rounded to this format and multiplied as unsigned bytes, I or I + 128:
// and, since ties go to even mantissas, whether it has a mantissa.
bool fits_activations(const Format& format);
// Whether a scale is a positive normal number of at most 8 significant bits (a bfloat16).
bool is_short_scale(float scale);

// Lookup tables over an 8-bit window whose low `bits` bits are a code: periodic in 2^bits, as
// kernels.h asks.
struct FormatTables {
  int8_t low[256];   // byte class: I; pair class: the low plane of I = 256 * high + low, low in
                     // -128..127
  int8_t high[256];  // pair class only
  int16_t words[2][256];  // low and high as words
  int16_t joined[256];    // I of byte and pair class
  float value[256];       // I as float, exact
};
void fill_tables(const Format& format, FormatTables* tables);

// Bytes of a packed [n, k] weight (layout: afpq/packing.py).
inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
inline size_t packed_bytes(size_t n, size_t k, unsigned bits) {
  return ceil_div(n, 16) * ceil_div(k, 4) * 8 * bits;
}

}  // namespace afpq
