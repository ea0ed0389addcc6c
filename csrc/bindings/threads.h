// Threads for the length of one call of a driver. They do not outlive it, because a pool would not
// survive a fork, and loaders of data fork.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "core/parallel.h"

namespace afpq {

class Threads {
 public:
  // At most `count` threads, the calling one included. None is started before there is work for it.
  explicit Threads(size_t count) : count_(count) { crew_.came(count); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  ~Threads() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  Parallel parallel() { return {run, this, &crew_}; }

 private:
  using Task = void (*)(void* user, size_t i);

  static void run(void* self, size_t total, Task task, void* user) {
    static_cast<Threads*>(self)->share(total, task, user);
  }

  void share(size_t total, Task task, void* user) {
    start(std::min(count_, total));
    {
      std::unique_lock<std::mutex> lock(mutex_);
      // A thread that came late to the last job may still be looking for work in it.
      idle_.wait(lock, [this] { return busy_ == 0; });
      total_ = total, task_ = task, user_ = user;
      next_ = 0;
      ++job_;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return busy_ == 0; });
  }

  void start(size_t wanted) {
    try {
      while (threads_.size() + 1 < wanted) threads_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {
      // The system gives no more threads: those that there are do the work.
    }
  }

  void serve() {
    size_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopped_ || job_ != seen; });
      if (stopped_) return;
      seen = job_;
      ++busy_;
      lock.unlock();
      work();
      lock.lock();
      if (--busy_ == 0) idle_.notify_all();
    }
  }

  // The job does not change while a thread is busy.
  void work() {
    for (size_t i; (i = next_++) < total_;) task_(user_, i);
  }

  const size_t count_;
  Crew crew_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  size_t job_ = 0;
  size_t busy_ = 0;
  bool stopped_ = false;
  std::atomic<size_t> next_{0};
  size_t total_ = 0;
  Task task_ = nullptr;
  void* user_ = nullptr;
};

}  // namespace afpq
