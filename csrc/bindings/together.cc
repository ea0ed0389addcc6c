// `run_together` as tests see it.
#include "core/together.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/threads.h"

namespace afpq {
namespace {

// A step of a share, on which thread.
using Event = std::tuple<std::string, size_t, size_t>;

std::vector<Event> together_events(size_t threads, size_t most, const std::string& failing) {
  Threads pool(threads);
  std::mutex mutex;
  std::vector<Event> events;
  const auto note = [&](const char* step, const Share& share) {
    const size_t thread = std::hash<std::thread::id>()(std::this_thread::get_id());
    const std::lock_guard<std::mutex> lock(mutex);
    events.emplace_back(step, share.index, thread);
    if (failing == step) throw std::bad_alloc();
  };
  run_together(
      pool.parallel(), most, [&](const Share& share) { note("look", share); },
      [&](const Share& share, bool alone) { note(alone ? "make alone" : "make", share); },
      [&](const Share& share) { note("receive", share); },
      [&](const Share& share) { note("use", share); });
  return events;
}

}  // namespace
}  // namespace afpq

void bind_together(nanobind::module_& module) {
  using namespace nanobind::literals;
  module.def("together_events", afpq::together_events, "threads"_a, "most"_a, "failing"_a,
             nanobind::call_guard<nanobind::gil_scoped_release>(),
             "Steps that threads ran together, in their order: (step, share, thread). The step "
             "`failing`, if any, runs out of memory.");
}
