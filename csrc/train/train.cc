#include "train/train.h"

#include <string.h>

#include <algorithm>
#include <vector>

namespace afpq {
namespace {

constexpr size_t kPiece = 1 << 16;  // elements of a task; a multiple of kRandomBlock

// Columns [column, column + lanes) of rows [k, k + count) of rhs, filled up with zeros.
void pack_panel(const float* rhs, size_t n, size_t column, size_t lanes, size_t k, size_t count,
                float* panel) {
  const size_t width = std::min(lanes, n - column);
  for (size_t i = 0; i < count; ++i) {
    memcpy(panel + i * lanes, rhs + (k + i) * n + column, width * sizeof(float));
    std::fill(panel + i * lanes + width, panel + (i + 1) * lanes, 0.0f);
  }
}

}  // namespace

const AfpqTrainKernels& train_kernels(const char* isa) {
#if defined(AFPQ_X86_64)
  for (const AfpqTrainKernels* kernels : {&kAfpqTrainAvx512, &kAfpqTrainAvx2}) {
    if (strcmp(kernels->isa, isa) == 0) return *kernels;
  }
#endif
  (void)isa;
  return kAfpqTrainGeneric;
}

void round_values(const AfpqTrainKernels& kernels, const Parallel& parallel,
                  const AfpqFloatFormat& format, Seed seed, const float* src, float* dst,
                  size_t size) {
  parallel_for(parallel, (size + kPiece - 1) / kPiece, [&](size_t piece) {
    const size_t begin = piece * kPiece, count = std::min(kPiece, size - begin);
    if (seed.stochastic) {
      kernels.round_stochastic(&format, seed.value, begin, src + begin, dst + begin, count);
    } else {
      kernels.round_nearest(&format, src + begin, dst + begin, count);
    }
  });
}

void multiply_rounded(const AfpqTrainKernels& kernels, const Parallel& parallel,
                      const AfpqFloatFormat& format, Seed seed, size_t chunk, const float* lhs,
                      const float* rhs, size_t m, size_t n, size_t k, float* dst) {
  const size_t lanes = kernels.lanes;
  chunk = std::min(chunk, std::max<size_t>(k, 1));
  parallel_for(parallel, (n + lanes - 1) / lanes, [&](size_t block) {
    const size_t column = block * lanes;
    std::vector<float> panel(chunk * lanes), totals(m * lanes, 0.0f);
    for (size_t begin = 0, j = 0; begin < k; begin += chunk, ++j) {
      const size_t count = std::min(chunk, k - begin);
      pack_panel(rhs, n, column, lanes, begin, count, panel.data());
      if (seed.stochastic) {
        kernels.add_chunk_stochastic(&format, seed.value, lhs + begin, k, panel.data(), count, m,
                                     totals.data(), column, n, static_cast<uint32_t>(begin),
                                     static_cast<uint32_t>(j));
      } else {
        kernels.add_chunk(&format, lhs + begin, k, panel.data(), count, m, totals.data());
      }
    }
    const size_t width = std::min(lanes, n - column);
    for (size_t row = 0; row < m; ++row) {
      memcpy(dst + row * n + column, totals.data() + row * lanes, width * sizeof(float));
    }
  });
}

}  // namespace afpq
