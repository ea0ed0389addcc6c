#include "core/huge_pages.h"

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace afpq {

void use_huge_pages(const void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE: at once; Linux 6.1 has it, many headers do not
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (at + kPage - 1) / kPage * kPage, end = (at + bytes) / kPage * kPage;
  if (begin >= end) return;
  void* const pages = reinterpret_cast<void*>(begin);
  madvise(pages, end - begin, MADV_HUGEPAGE);
  madvise(pages, end - begin, kCollapse);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace afpq
