// Work sharing without owning threads: the caller (onnxruntime's pool, or a test) says how tasks
// are run.
#pragma once

#include <stddef.h>

#include <atomic>
#include <new>
#include <type_traits>

namespace afpq {

struct Parallel {
  // Calls task(user, i) for every i in 0..total-1, in any order, on any thread; returns when all
  // are done.
  void (*run)(void* context, size_t total, void (*task)(void* user, size_t i), void* user);
  void* context;
};

// All tasks one after the other, on the thread that asks.
inline const Parallel& serial() {
  static const Parallel kSerial = {
      [](void*, size_t total, void (*task)(void*, size_t), void* user) {
        for (size_t i = 0; i < total; ++i) task(user, i);
      },
      nullptr};
  return kSerial;
}

// body(i) for i in 0..total-1. A task that runs out of memory does not unwind through foreign
// threads: the failure is kept and thrown here, when all tasks are done.
template <typename Body>
void parallel_for(const Parallel& parallel, size_t total, Body&& body) {
  if (total <= 1) {
    if (total == 1) body(size_t{0});
    return;
  }
  struct Shared {
    std::remove_reference_t<Body>* body;
    std::atomic<bool> out_of_memory{false};
  } shared{&body};
  const auto task = [](void* user, size_t i) {
    auto* state = static_cast<Shared*>(user);
    try {
      (*state->body)(i);
    } catch (const std::bad_alloc&) {
      state->out_of_memory = true;
    }
  };
  parallel.run(parallel.context, total, task, &shared);
  if (shared.out_of_memory) throw std::bad_alloc();
}

}  // namespace afpq
