// What layers are held against: how fast the kernel of bytes is at its best, and what lines of a
// cache cost that pass between two cores.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/kernel_arguments.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Seconds that `calls` products of 6 x 64 x 256 bytes take, which stay in L1: the most that layers
// can reach.
double time_products(const std::string& isa, size_t calls) {
  constexpr size_t kTiles = 64;
  const AfpqKernels& kernels = table_of(isa);
  const std::vector<uint8_t> lhs(kMaxRows * kTiles * kTileK, 3);
  const std::vector<int8_t> rhs(kPanelBlocks * kTiles * kTileCodes, 5);
  std::vector<int32_t> dst(kMaxRows * kPanelN);
  const uint8_t* rows[kMaxRows];
  for (size_t r = 0; r < kMaxRows; ++r) rows[r] = lhs.data() + r * kTiles * kTileK;
  const auto start = Clock::now();
  for (size_t i = 0; i < calls; ++i) {
    kernels.gemm_s32_u8_s8(rows, 1, kTiles, rhs.data(), kTiles, kMaxRows, kPanelBlocks, 60, 0, {},
                           dst.data());
  }
  return seconds_since(start);
}

// Looks until others have counted as far; when that takes long, they may have the processor.
void wait_for(const std::atomic<size_t>& counter, size_t number) {
  constexpr size_t kPatience = size_t{1} << 16;  // looks
  for (size_t looks = 0; counter.load(std::memory_order_acquire) < number; ++looks) {
    if (looks >= kPatience) std::this_thread::yield();
  }
}

// Two threads that take turns, each on a core of its own if there are two.
class Turns {
 public:
  void wait(size_t turn) const { wait_for(turn_, turn); }
  void end(size_t turn) { turn_.store(turn + 1, std::memory_order_release); }

 private:
  alignas(64) std::atomic<size_t> turn_{0};
};

struct alignas(64) Line {
  std::atomic<uint64_t> words[8] = {};
};

double write_lines(std::vector<Line>* lines, uint64_t value) {
  const auto start = Clock::now();
  for (Line& line : *lines) {
    for (auto& word : line.words) word.store(value, std::memory_order_relaxed);
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);  // until all are written
  return seconds_since(start);
}

double read_lines(const std::vector<Line>& lines) {
  uint64_t all = 0;
  const auto start = Clock::now();
  for (const Line& line : lines) all |= line.words[0].load(std::memory_order_relaxed);
  std::atomic<uint64_t> kept{all};
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return seconds_since(start);
}

double median(std::vector<double>* values) {
  const auto middle = values->begin() + static_cast<ptrdiff_t>(values->size() / 2);
  std::nth_element(values->begin(), middle, values->end());
  return *middle;
}

// Median seconds a line: written where no other core has it, read where the other has written it,
// and written where both have read it.
std::tuple<double, double, double> time_lines(size_t count, size_t rounds) {
  require(count > 0 && rounds > 0, "count and rounds must be positive");
  std::vector<Line> lines(count);
  std::vector<double> own(rounds), read(rounds), shared(rounds);
  Turns turns;
  std::thread reader([&] {
    for (size_t r = 0; r < rounds; ++r) {
      turns.wait(2 * r + 1);
      read[r] = read_lines(lines);
      turns.end(2 * r + 1);
    }
  });
  for (size_t r = 0; r < rounds; ++r) {
    turns.wait(2 * r);
    read_lines(lines);
    shared[r] = write_lines(&lines, 2 * r);
    own[r] = write_lines(&lines, 2 * r + 1);
    turns.end(2 * r);
  }
  reader.join();
  const double per_line = 1.0 / static_cast<double>(count);
  return {median(&own) * per_line, median(&read) * per_line, median(&shared) * per_line};
}

// Two threads that meet again and again.
class Meetings {
 public:
  void meet() { wait_for(arrived_, (arrived_.fetch_add(1) / 2 + 1) * 2); }

 private:
  alignas(64) std::atomic<size_t> arrived_{0};
};

// Median seconds a line of `runs` times `length` lines, of which two threads write and read the
// same halves again and again, at the same time: a half of each run, or half of the runs.
double time_halves(size_t runs, size_t length, bool whole_runs, size_t rounds) {
  require(runs > 0 && length > 0 && rounds > 0, "runs, length and rounds must be positive");
  require(runs % 2 == 0 && length % 2 == 0, "runs and length must be even");
  const size_t count = whole_runs ? runs / 2 : runs, size = whole_runs ? length : length / 2;
  struct alignas(64) Words {
    uint64_t words[8];
  };
  std::vector<Words> lines(runs * length);  // no thread reads what the other writes
  std::vector<double> seconds(rounds);
  Meetings meetings;
  const auto work = [&](size_t thread) {
    uint64_t all = 0;
    const auto each = [&](const auto& body) {
      Words* first = lines.data() + thread * (whole_runs ? count * length : size);
      for (size_t run = 0; run < count; ++run, first += length) {
        for (size_t i = 0; i < size; ++i) body(first[i]);
      }
    };
    for (size_t r = 0; r < rounds; ++r) {
      meetings.meet();
      const auto start = Clock::now();
      each([&](Words& line) { std::fill_n(line.words, 8, r | all); });
      std::atomic_thread_fence(std::memory_order_seq_cst);  // until all are written
      if (thread == 0) seconds[r] = seconds_since(start);
      meetings.meet();
      uint64_t read = 0;
      each([&](const Words& line) { read |= line.words[r % 8]; });
      all = read;
    }
  };
  std::thread other(work, 1);
  work(0);
  other.join();
  return median(&seconds) / static_cast<double>(count * size);
}

}  // namespace

void bind_probes(nb::module_& module) {
  module.def("time_products", time_products, "isa"_a, "calls"_a,
             "Seconds of so many products of 6 x 64 x 256 bytes in L1.");
  module.def("time_lines", time_lines, "count"_a, "rounds"_a,
             nb::call_guard<nb::gil_scoped_release>(),
             "Seconds a line: written, read behind another core, written behind two that read.");
  module.def("time_halves", time_halves, "runs"_a, "length"_a, "whole_runs"_a, "rounds"_a,
             nb::call_guard<nb::gil_scoped_release>(),
             "Seconds a line written by one of two threads that write and read halves of runs of "
             "lines, or half of the runs.");
}
