// Which kernel table runs: the best one that the processor supports, or the one that AFPQ_ISA
// names.
#pragma once

#include <vector>

#include "kernels/kernels.h"

namespace afpq {

// The names of the supported tables, best first. "scalar" is always the last one.
std::vector<const char*> isa_names();

// The table called `name`, or the best one when `name` is null or empty. Null when there is no such
// table here; then *error says so and lists the choices (valid until this thread's next call).
const AfpqKernels* select_kernels(const char* name, const char** error);

// The table for this process: select_kernels(getenv("AFPQ_ISA")), decided at the first call. *error
// stays valid.
const AfpqKernels* active_kernels(const char** error);

}  // namespace afpq
