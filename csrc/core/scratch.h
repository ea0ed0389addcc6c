// Working memory of one thread: grows to the largest request, is reused, is never shared.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>

namespace afpq {

class Scratch {
 public:
  // Forgets earlier `take`s and makes room for `bytes`.
  void reset(size_t bytes) {
    if (bytes > capacity_) {
      memory_.reset();
      memory_.reset(new uint8_t[bytes + kAlignment]);  // not value-initialised
      capacity_ = bytes;
    }
    used_ = 0;
  }
  // `count` elements, 64-byte aligned. The total since `reset` must stay within its `bytes` (see
  // `room`).
  template <typename T>
  T* take(size_t count) {
    const uintptr_t base =
        (reinterpret_cast<uintptr_t>(memory_.get()) + kAlignment - 1) / kAlignment;
    uint8_t* result = reinterpret_cast<uint8_t*>(base * kAlignment) + used_;
    used_ += room<T>(count);
    return reinterpret_cast<T*>(result);
  }
  template <typename T>
  static size_t room(size_t count) {
    return (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }

 private:
  static constexpr size_t kAlignment = 64;
  std::unique_ptr<uint8_t[]> memory_;
  size_t capacity_ = 0;
  size_t used_ = 0;
};

// One for the thread that runs a layer, one for each thread that runs its tasks (the same thread
// may do both), and one for what a task needs while it runs tasks of its own.
Scratch& layer_scratch();
Scratch& strip_scratch();
Scratch& task_scratch();

}  // namespace afpq
