#include "core/format.h"

#include <cmath>

#include "core/float_bits.h"

namespace afpq {

int64_t Format::integer(unsigned code) const {
  const unsigned magnitude_bits = exponent_bits + mantissa_bits;
  const unsigned magnitude = code & ((1u << magnitude_bits) - 1);
  const unsigned exponent = magnitude >> mantissa_bits;
  const int64_t mantissa = magnitude & ((1u << mantissa_bits) - 1);
  const int64_t hidden = int64_t{1} << mantissa_bits;
  const int64_t value = exponent == 0 ? mantissa : (hidden + mantissa) << (exponent - 1);
  return is_signed && (code >> magnitude_bits & 1) ? -value : value;
}

int64_t Format::max_integer() const { return integer((1u << (exponent_bits + mantissa_bits)) - 1); }

int Format::num_planes() const {
  const int64_t max = max_integer();
  return max <= 127 ? 1 : max <= 32767 ? 2 : 0;
}

bool parse_format(const char* text, Format* format) {
  Format result;
  if (*text == 'u') {
    result.is_signed = false;
    ++text;
  }
  if (text[0] != 'e' || text[1] < '0' || text[1] > '5') return false;
  if (text[2] != 'm' || text[3] < '0' || text[3] > '7' || text[4] != '\0') return false;
  result.exponent_bits = text[1] - '0';
  result.mantissa_bits = text[3] - '0';
  if (result.bits() < 2 || result.bits() > 8) return false;
  *format = result;
  return true;
}

bool fits_activations(const Format& format) {
  return format.mantissa_bits > 0 && format.max_integer() <= (format.is_signed ? 127 : 255);
}

bool is_short_scale(float scale) {
  return scale > 0 && std::isnormal(scale) && (bits_of(scale) & 0xffff) == 0;
}

void fill_tables(const Format& format, FormatTables* tables) {
  const unsigned mask = (1u << format.bits()) - 1;
  const int planes = format.num_planes();
  for (unsigned window = 0; window < 256; ++window) {
    const int64_t integer = format.integer(window & mask);
    tables->value[window] = static_cast<float>(integer);
    tables->low[window] = planes == 0 ? 0 : static_cast<int8_t>(integer & 255);
    tables->high[window] =
        planes == 2 ? static_cast<int8_t>((integer - tables->low[window]) / 256) : 0;
    tables->words[0][window] = tables->low[window];
    tables->words[1][window] = tables->high[window];
    tables->joined[window] = planes == 0 ? 0 : static_cast<int16_t>(integer);
  }
}

}  // namespace afpq
