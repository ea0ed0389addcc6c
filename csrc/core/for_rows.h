// Work on the rows of a weight, shared out over short-lived threads: for the preparation of a
// model, not for running one (see parallel.h).
#pragma once

#include <algorithm>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace afpq {

// Rows are cut into one contiguous range per thread; `body(begin, end)` must not throw.
template <typename Body>
void for_rows(size_t n, size_t num_threads, const Body& body) {
  const size_t workers = std::max<size_t>(1, std::min(num_threads, n));
  std::vector<std::thread> threads;
  for (size_t t = 1; t < workers; ++t) {
    const size_t begin = n * t / workers, end = n * (t + 1) / workers;
    try {
      threads.emplace_back([&body, begin, end] { body(begin, end); });
    } catch (const std::system_error&) {
      body(begin, end);  // no thread to be had: the caller's does the work
    }
  }
  body(0, n / workers);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace afpq
