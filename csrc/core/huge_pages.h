// Memory in pages of 2 MB, where there are such: what is read once through pages of 4 KB waits for
// the translation of each, and for reading ahead to begin anew.
#pragma once

#include <stddef.h>

namespace afpq {

// Asks the system for it, for the whole pages within `bytes` from `data` on. The contents stay, and
// nothing fails where it cannot be done.
void use_huge_pages(const void* data, size_t bytes);

}  // namespace afpq
