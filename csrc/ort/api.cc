#include "ort/api.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace afpq::ort {
namespace {

// Slots of the function table used here.
enum Slot : size_t {
  kGetErrorMessage = 2,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kAttributeFloat = 85,
  kAttributeInt64 = 86,
  kAttributeString = 87,
  kContextInputCount = 88,
  kContextInput = 90,
  kContextOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
  kAttributeArrayInt64 = 163,
  kNodeName = 244,
  kConstantInput = 249,
  kParallelFor = 274,
  kTypeAndShapeReference = 414,
};

// The last table that has kTypeAndShapeReference.
std::atomic<const OrtApi*> newer_table{nullptr};

// True for success; the status is released either way. For questions whose "no" is not an error.
bool succeeded(const OrtApi* api, OrtStatus* status) {
  if (status == nullptr) return true;
  call<void(OrtStatus*)>(api, kReleaseStatus)(status);
  return false;
}

void read_type_and_shape(const OrtApi* api, const OrtValue* value, const char* what,
                         Tensor* tensor) {
  if (api == newer_table.load(std::memory_order_relaxed)) {
    const int64_t* dims = nullptr;
    size_t rank = 0;
    check(api,
          call<OrtStatus*(const OrtValue*, int*, const int64_t**, size_t*)>(
              api, kTypeAndShapeReference)(value, &tensor->type, &dims, &rank),
          what);
    tensor->dims.assign(dims, dims + rank);
    return;
  }
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api,
        call<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(api, kGetTensorTypeAndShape)(
            value, &info),
        what);
  size_t rank = 0;
  OrtStatus* status = call<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int*)>(
      api, kGetTensorElementType)(info, &tensor->type);
  if (!status) {
    status = call<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>(api, kGetDimensionsCount)(
        info, &rank);
  }
  if (!status) {
    tensor->dims.resize(rank);
    status = call<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(
        api, kGetDimensions)(info, tensor->dims.data(), rank);
  }
  call<void(OrtTensorTypeAndShapeInfo*)>(api, kReleaseTensorTypeAndShapeInfo)(info);
  check(api, status, what);
}

Tensor describe(const OrtApi* api, const OrtValue* value, const char* what) {
  Tensor tensor;
  read_type_and_shape(api, value, what, &tensor);
  void* data = nullptr;
  check(api,
        call<OrtStatus*(OrtValue*, void**)>(api, kGetTensorMutableData)(
            const_cast<OrtValue*>(value), &data),
        what);
  tensor.data = data;
  return tensor;
}

}  // namespace

void note_version(const OrtApi* api, const char* version) {
  // "1.24.0" has API 24.
  const char* minor = std::strchr(version, '.');
  if (minor && std::atoi(minor + 1) >= 24) newer_table = api;
}

void check(const OrtApi* api, OrtStatus* status, const char* what) {
  if (status == nullptr) return;
  const std::string message = call<const char*(const OrtStatus*)>(api, kGetErrorMessage)(status);
  call<void(OrtStatus*)>(api, kReleaseStatus)(status);
  throw Error(kFail, std::string(what) + ": " + message);
}

size_t Tensor::size() const {
  size_t count = 1;
  for (const int64_t dim : dims) count *= static_cast<size_t>(dim);
  return count;
}

std::string to_string(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

std::string KernelInfo::node_name() const {
  const auto get = call<OrtStatus*(const OrtKernelInfo*, char*, size_t*)>(api_, kNodeName);
  size_t size = 0;
  succeeded(api_, get(info_, nullptr, &size));
  std::string name(size, '\0');
  if (size == 0 || !succeeded(api_, get(info_, &name[0], &size))) return "";
  name.resize(size - 1);
  return name;
}

bool KernelInfo::get_integer(const char* name, int64_t* value) const {
  return succeeded(api_, call<OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>(
                             api_, kAttributeInt64)(info_, name, value));
}

bool KernelInfo::get_text(const char* name, std::string* value) const {
  const auto get =
      call<OrtStatus*(const OrtKernelInfo*, const char*, char*, size_t*)>(api_, kAttributeString);
  size_t size = 0;
  if (!succeeded(api_, get(info_, name, nullptr, &size)) || size == 0) return false;
  value->assign(size, '\0');
  if (!succeeded(api_, get(info_, name, &(*value)[0], &size))) return false;
  value->resize(size - 1);
  return true;
}

int64_t KernelInfo::integer(const char* name) const {
  int64_t value = 0;
  if (!get_integer(name, &value))
    throw Error(kInvalidArgument, std::string("attribute ") + name + " is missing");
  return value;
}

int64_t KernelInfo::integer(const char* name, int64_t missing) const {
  int64_t value = 0;
  return get_integer(name, &value) ? value : missing;
}

float KernelInfo::real(const char* name, float missing) const {
  float value = 0;
  const auto get =
      call<OrtStatus*(const OrtKernelInfo*, const char*, float*)>(api_, kAttributeFloat);
  return succeeded(api_, get(info_, name, &value)) ? value : missing;
}

std::string KernelInfo::text(const char* name) const {
  std::string value;
  if (!get_text(name, &value))
    throw Error(kInvalidArgument, std::string("attribute ") + name + " is missing");
  return value;
}

std::string KernelInfo::text(const char* name, const std::string& missing) const {
  std::string value;
  return get_text(name, &value) ? value : missing;
}

std::vector<int64_t> KernelInfo::integers(const char* name) const {
  const auto get = call<OrtStatus*(const OrtKernelInfo*, const char*, int64_t*, size_t*)>(
      api_, kAttributeArrayInt64);
  size_t size = 0;
  if (!succeeded(api_, get(info_, name, nullptr, &size)) || size == 0) return {};
  std::vector<int64_t> values(size);
  if (!succeeded(api_, get(info_, name, values.data(), &size))) return {};
  return values;
}

bool KernelInfo::get_constant(size_t index, const char* what, Tensor* tensor) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  const bool exists =
      succeeded(api_, call<OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(
                          api_, kConstantInput)(info_, index, &is_constant, &value));
  if (!exists || !is_constant || value == nullptr) return false;
  *tensor = describe(api_, value, what);
  return true;
}

Tensor KernelInfo::constant(size_t index, const char* what) const {
  Tensor tensor;
  if (!get_constant(index, what, &tensor))
    throw Error(kInvalidArgument, std::string("input ") + what + " must be an initializer");
  return tensor;
}

Tensor KernelContext::input(size_t index) const {
  const OrtValue* value = nullptr;
  check(api_,
        call<OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>(api_, kContextInput)(
            context_, index, &value),
        "input");
  return value == nullptr ? Tensor{} : describe(api_, value, "input");
}

size_t KernelContext::num_inputs() const {
  size_t count = 0;
  check(api_,
        call<OrtStatus*(const OrtKernelContext*, size_t*)>(api_, kContextInputCount)(context_,
                                                                                     &count),
        "inputs");
  return count;
}

void* KernelContext::output_data(size_t index, const std::vector<int64_t>& dims) const {
  OrtValue* value = nullptr;
  check(api_,
        call<OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(
            api_, kContextOutput)(context_, index, dims.data(), dims.size(), &value),
        "output");
  void* data = nullptr;
  check(api_, call<OrtStatus*(OrtValue*, void**)>(api_, kGetTensorMutableData)(value, &data),
        "output");
  return static_cast<float*>(data);
}

Parallel KernelContext::parallel() {
  return {[](void* self, size_t total, void (*task)(void*, size_t), void* user) {
            const KernelContext* context = static_cast<const KernelContext*>(self);
            const auto run = call<OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t),
                                             size_t, size_t, void*)>(context->api_, kParallelFor);
            check(context->api_, run(context->context_, task, total, 0, user), "parallel for");
          },
          this, crew_};
}

}  // namespace afpq::ort
