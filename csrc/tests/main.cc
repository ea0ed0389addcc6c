// Compares the kernel table of this process (the best one, or the one that AFPQ_ISA names) with the
// scalar one, entry by entry, and what the drivers make of both. Exit code 0: equal bits
// everywhere; 1: not; 2: no such table.
#include <cinttypes>

#include "kernels/dispatch.h"
#include "tests/check.h"

int main() {
  const char* error = "";
  const AfpqKernels* kernels = afpq::active_kernels(&error);
  if (kernels == nullptr) {
    std::fprintf(stderr, "%s\n", error);
    return 2;
  }
  std::printf("isa: %s\n", kernels->isa);
  afpq::tests::Comparison comparison(*kernels);
  compare_products(&comparison);
  compare_rounding(&comparison);
  compare_ends(&comparison);
  compare_planar_kernels(&comparison);
  const uint64_t checksum = compare_drivers(&comparison);
  const bool good = comparison.report();
  std::printf("checksum: %016" PRIx64 "\n", checksum);
  return good ? 0 : 1;
}
