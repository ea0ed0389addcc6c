// The largest byte of each channel under a window, on channel-last tensors. Bytes of one static
// format are in the order of what they stand for.
#pragma once

#include "drivers/conv.h"

namespace afpq {

// src: [batch, in..., channels_in], dst: [batch, out..., channels_in]. Of the shape, groups and
// channels_out do not count. What lies in the padding does not count either; every window holds an
// element.
void max_pool(const ConvShape& shape, const uint8_t* src, size_t batch, uint8_t* dst,
              const Parallel& parallel);

}  // namespace afpq
