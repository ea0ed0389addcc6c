#include "core/scratch.h"

namespace afpq {

Scratch& layer_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

Scratch& strip_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

Scratch& task_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace afpq
