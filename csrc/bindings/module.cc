// The Python extension `_core`: format tables, scale search, and every driver, so that C++ is
// tested from Python.
#include <nanobind/nanobind.h>

#include "bindings/bindings.h"

NB_MODULE(_core, module) {
  module.doc() = "Native parts of afpq; the public API is the package afpq.";
  bind_kernels(module);
  bind_rounding(module);
  bind_drivers(module);
  bind_together(module);
  bind_probes(module);
  bind_train(module);
}
