// Work sharing without owning threads: the caller (onnxruntime's pool, or a test) says how tasks
// are run.
#pragma once

#include <stddef.h>

#include <atomic>
#include <new>
#include <type_traits>

namespace afpq {

// How many threads are likely to come at once, as one caller of a pool has seen: it is told which
// tasks threads ran, not how many there are.
class Crew {
 public:
  // Of at most `most`. Now and then, and less and less often, one more than were seen.
  size_t next(size_t most) {
    const size_t calls = calls_.fetch_add(1, std::memory_order_relaxed) + 1;
    const size_t more = (calls & (calls - 1)) == 0 ? 1 : 0;
    const size_t count = seen_.load(std::memory_order_relaxed) + more;
    return count < most ? count : most;
  }
  void came(size_t count) {
    if (count > seen_.load(std::memory_order_relaxed))
      seen_.store(count, std::memory_order_relaxed);
  }

 private:
  std::atomic<size_t> calls_{0}, seen_{1};
};

struct Parallel {
  // Calls task(user, i) for every i in 0..total-1, in any order, on any thread; returns when all
  // are done.
  void (*run)(void* context, size_t total, void (*task)(void* user, size_t i), void* user);
  void* context;
  Crew* crew = nullptr;  // none: no other threads
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
