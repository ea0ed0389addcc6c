// A small C++ face of the C ABI: attributes, tensors and the runtime's thread pool. Failures are
// thrown as `Error` and become statuses at the library's border (op.h); no exception leaves the
// library.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "ort/abi.h"

namespace afpq::ort {

struct Error : std::runtime_error {
  Error(int code, const std::string& message) : std::runtime_error(message), code(code) {}
  int code;
};

void check(const OrtApi* api, OrtStatus* status, const char* what);

// Says of which version the runtime of a table is: tensors of newer ones are looked at without
// allocating anything.
void note_version(const OrtApi* api, const char* version);

// A tensor as ops see it.
struct Tensor {
  int type = 0;
  std::vector<int64_t> dims;
  const void* data = nullptr;

  size_t size() const;
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};
std::string to_string(const std::vector<int64_t>& dims);

// What a kernel's constructor reads. Attribute names are named in every error.
class KernelInfo {
 public:
  KernelInfo(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  std::string node_name() const;
  int64_t integer(const char* name) const;
  int64_t integer(const char* name, int64_t missing) const;
  float real(const char* name, float missing) const;
  std::string text(const char* name) const;
  std::string text(const char* name, const std::string& missing) const;
  std::vector<int64_t> integers(const char* name) const;  // empty when missing
  // Input `index` if it exists and is a constant: its data stays valid as long as the session.
  bool get_constant(size_t index, const char* what, Tensor* tensor) const;
  // The same of one that must be.
  Tensor constant(size_t index, const char* what) const;

 private:
  bool get_integer(const char* name, int64_t* value) const;
  bool get_text(const char* name, std::string* value) const;
  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

// What a kernel's compute reads and writes.
class KernelContext {
 public:
  // crew: of the kernel.
  KernelContext(const OrtApi* api, OrtKernelContext* context, Crew* crew)
      : api_(api), context_(context), crew_(crew) {}

  // data is null when an optional input is absent.
  Tensor input(size_t index) const;
  size_t num_inputs() const;
  template <typename T>
  T* output(size_t index, const std::vector<int64_t>& dims) const {
    return static_cast<T*>(output_data(index, dims));
  }
  Parallel parallel();

  void* output_data(size_t index, const std::vector<int64_t>& dims) const;

  const OrtApi* api_;
  OrtKernelContext* context_;
  Crew* crew_;
};

}  // namespace afpq::ort
