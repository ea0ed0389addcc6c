// Work sharing without owning threads: the caller (onnxruntime's pool, or a test) says how tasks are run.
#pragma once

#include <stddef.h>

#include <utility>

namespace afpq {

struct Parallel {
  // Calls task(user, i) for every i in 0..total-1, in any order, on any thread; returns when all are done.
  void (*run)(void* context, size_t total, void (*task)(void* user, size_t i), void* user);
  void* context;
};

template <typename Body>
void parallel_for(const Parallel& parallel, size_t total, Body&& body) {
  if (total <= 1) {
    if (total == 1) body(size_t{0});
    return;
  }
  parallel.run(
      parallel.context, total, [](void* user, size_t i) { (*static_cast<Body*>(user))(i); }, &body);
}

}  // namespace afpq
