// What the comparison of two kernel tables needs: random inputs that are the same on every machine,
// arrays that a kernel must not leave, and results that must have equal bits.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/kernels.h"

namespace afpq::tests {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// SplitMix64. Floats are sums of integers times a power of two: no library, no rounding.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // low..high, both included.
  int64_t in(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  // About -4..4, most of them near 0, with 24 significant bits.
  float number() {
    int64_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += in(-(1 << 21), 1 << 21);
    return static_cast<float>(sum) * 0x1p-21f;
  }

  template <typename T>
  std::vector<T> integers(size_t count, int64_t low, int64_t high) {
    std::vector<T> result(count);
    for (T& value : result) value = static_cast<T>(in(low, high));
    return result;
  }
  std::vector<float> numbers(size_t count) {
    std::vector<float> result(count);
    for (float& value : result) value = number();
    return result;
  }

 private:
  uint64_t state_;
};

// A copy of some values that ends where a page begins that cannot be touched, so that whoever goes
// beyond the end crashes. What lies before it must stay as it is.
template <typename T>
class Guarded {
 public:
  explicit Guarded(const std::vector<T>& values) : count_(values.size()) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = count_ * sizeof(T);
    used_ = (bytes / page + 1) * page;
    size_ = used_ + page;
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    memory_ = static_cast<uint8_t*>(memory);
    if (mprotect(memory_ + used_, page, PROT_NONE) != 0) std::abort();
    std::memset(memory_, kCanary, used_ - bytes);
    data_ = reinterpret_cast<T*>(memory_ + used_ - bytes);
    if (count_ > 0) std::memcpy(data_, values.data(), bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(memory_, size_); }

  T* data() const { return data_; }
  bool intact() const {
    for (const uint8_t* p = memory_; p < reinterpret_cast<const uint8_t*>(data_); ++p)
      if (*p != kCanary) return false;
    return true;
  }

 private:
  static constexpr uint8_t kCanary = 0xa5;
  size_t count_, used_, size_;
  uint8_t* memory_;
  T* data_;
};

// Equal bits, or both NaN.
template <typename T>
bool same(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    if (a != a && b != b) return true;
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// Compares a table with the scalar one. What it counts is printed at the end.
class Comparison {
 public:
  explicit Comparison(const AfpqKernels& table) : table_(table) {}

  const AfpqKernels& table() const { return table_; }
  void begin(const char* name) {
    name_ = name;
    names_.push_back({name, 0, 0});
  }

  // run(table, results) with the scalar table and with this one, on results that are `before`.
  template <typename T, typename Run>
  std::vector<T> results(const std::vector<T>& before, const std::string& what, const Run& run) {
    const Guarded<T> expected(before), actual(before);
    run(kAfpqKernelsScalar, expected.data());
    run(table_, actual.data());
    Count& count = names_.back();
    ++count.compared;
    std::string text;
    if (!actual.intact()) text = "wrote before the beginning";
    for (size_t i = 0; i < before.size() && text.empty(); ++i) {
      if (same(expected.data()[i], actual.data()[i])) continue;
      text = "element " + std::to_string(i) + " is " + std::to_string(actual.data()[i]) +
             ", scalar has " + std::to_string(expected.data()[i]);
    }
    if (!text.empty() && ++count.different <= kMostMessages)
      std::printf("%s: %s: %s\n", name_, what.c_str(), text.c_str());
    return {expected.data(), expected.data() + before.size()};
  }

  // One line for each name; whether nothing was different.
  bool report() const {
    bool good = true;
    for (const Count& count : names_) {
      std::printf("%s: %d compared, %d different\n", count.name, count.compared, count.different);
      good &= count.different == 0 && count.compared > 0;
    }
    return good;
  }

 private:
  struct Count {
    const char* name;
    int compared, different;
  };
  static constexpr int kMostMessages = 3;
  const AfpqKernels& table_;
  const char* name_ = "";
  std::vector<Count> names_;
};

// What outputs are clamped to.
struct Bounds {
  float low, high;
};
constexpr Bounds kBounds[] = {{-__builtin_inff(), __builtin_inff()}, {0.0f, 6.0f}, {-0.5f, 0.25f}};

// What a case is called: its numbers.
template <typename... Numbers>
std::string text_of(const char* names, Numbers... numbers) {
  std::string result = names;
  ((result += ' ' + std::to_string(numbers)), ...);
  return result;
}

void compare_products(Comparison* comparison);
void compare_rounding(Comparison* comparison);
void compare_ends(Comparison* comparison);
void compare_planar_kernels(Comparison* comparison);
// Returns a checksum of all results, which is the same on every machine.
uint64_t compare_drivers(Comparison* comparison);

}  // namespace afpq::tests
