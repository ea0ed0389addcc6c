// Rows of a packed table as floats: embedding look-ups, and whole tensors for consumers without a
// kernel (Unpack).
#pragma once

#include "core/parallel.h"
#include "drivers/weight.h"

namespace afpq {

// dst: [count, k]. Indices may be negative, counted from the end. False if one is out of range; it
// is left in *bad.
bool gather(const PackedWeight& weight, const int64_t* indices, size_t count, float* dst,
            const Parallel& parallel, int64_t* bad);

// dst: [n, k].
void unpack(const PackedWeight& weight, float* dst, const Parallel& parallel);

}  // namespace afpq
