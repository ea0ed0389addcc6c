// A float as the bits that store it, and back.
#pragma once

#include <stdint.h>
#include <string.h>

namespace afpq {

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace afpq
