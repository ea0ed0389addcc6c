// Threads that make something together in one call of the pool: each has a share of every step, and
// begins the next one when all have ended the one before.
//
//   share 0:  look | make | receive, use
//   share 1:  look | make | receive, use
//
// A line of memory that several cores have read costs much to write (`afpq doctor --measure`): each
// thread therefore keeps what it makes, and passes on no more than others need.
#pragma once

#include <algorithm>
#include <thread>

#include "core/parallel.h"

namespace afpq {

constexpr size_t kLine = 64;  // bytes of a cache

struct Share {
  static constexpr size_t kMost = 8;
  size_t index, count;

  size_t begin(size_t total) const { return total * index / count; }
  size_t end(size_t total) const { return total * (index + 1) / count; }
};

// Who has which share, and how many have ended a step. Sets of shares are bits.
class Meeting {
 public:
  explicit Meeting(size_t count) : count_(count) {}

  // Takes a share, unless somebody has it.
  unsigned claim(size_t share) {
    if (is_claimed(share) || claimed_[share].exchange(true, std::memory_order_relaxed)) return 0;
    return 1u << share;
  }

  // Takes what is left when others had some time to come.
  unsigned claim_rest() {
    for (size_t looks = 0, share = 0; looks < kPatience && share < count_; ++looks)
      share += is_claimed(share) ? 1 : 0;
    unsigned shares = 0;
    for (size_t share = 0; share < count_; ++share) shares |= claim(share);
    return shares;
  }

  // Ends a step of `num_shares`, and waits for all others to be ended.
  void end(size_t step, size_t num_shares) {
    if (num_shares == count_) return;
    ended_[step].fetch_add(num_shares, std::memory_order_acq_rel);
    for (size_t looks = 0; ended_[step].load(std::memory_order_acquire) < count_; ++looks) {
      if (looks >= kPatience) std::this_thread::yield();
    }
  }

 private:
  static constexpr size_t kPatience = size_t{1} << 10;  // looks: about a microsecond

  bool is_claimed(size_t share) const { return claimed_[share].load(std::memory_order_relaxed); }

  const size_t count_;
  alignas(kLine) std::atomic<bool> claimed_[Share::kMost] = {};
  alignas(kLine) std::atomic<size_t> ended_[2] = {};
};

// Of at most `most` shares, as many as threads are likely to come: look(share), then make(share,
// alone), of all that a thread has; then receive(share) of all that it has not, and use(share) of
// all that it has. Those who are there take the shares of those who come too late.
template <typename Look, typename Make, typename Receive, typename Use>
void run_together(const Parallel& parallel, size_t most, const Look& look, const Make& make,
                  const Receive& receive, const Use& use) {
  const size_t count = parallel.crew ? parallel.crew->next(std::min(most, Share::kMost)) : 1;
  Meeting meeting(count);
  std::atomic<size_t> came{0};
  std::atomic<bool> out_of_memory{false};
  // Whoever fails ends its steps nevertheless, so that nobody waits for it.
  const auto each = [&](unsigned shares, const auto& body) {
    for (size_t i = 0; i < count; ++i) {
      if (!(shares >> i & 1) || out_of_memory.load(std::memory_order_relaxed)) continue;
      try {
        body(Share{i, count});
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
    }
  };
  parallel_for(parallel, count, [&](size_t task) {
    unsigned mine = meeting.claim(task);
    if (!mine) return;
    came.fetch_add(1, std::memory_order_relaxed);
    each(mine, look);
    const unsigned late = meeting.claim_rest();
    each(late, look);
    mine |= late;
    const auto num_shares = static_cast<size_t>(__builtin_popcount(mine));
    meeting.end(0, num_shares);
    each(mine, [&](const Share& share) { make(share, num_shares == count); });
    meeting.end(1, num_shares);
    each(~mine, receive);
    each(mine, use);
  });
  if (parallel.crew) parallel.crew->came(came);
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace afpq
