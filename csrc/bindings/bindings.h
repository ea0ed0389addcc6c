// One function per file of bindings.
#pragma once

#include <nanobind/nanobind.h>

void bind_kernels(nanobind::module_& module);
void bind_plane_kernels(nanobind::module_& kernels);  // called by bind_kernels
void bind_byte_kernels(nanobind::module_& kernels);   // the same
void bind_rounding(nanobind::module_& module);
void bind_drivers(nanobind::module_& module);
void bind_together(nanobind::module_& module);
void bind_probes(nanobind::module_& module);
void bind_train(nanobind::module_& module);
