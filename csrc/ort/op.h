// Turns a kernel class into an OrtCustomOp. A kernel class has
//   static constexpr const char* kName; kNumInputs; kNumRequired; kOutputType;
//   static int input_type(size_t);
//   explicit Kernel(const KernelInfo&);  void compute(KernelContext&);
// Every exception becomes a status that names the op and the node.
#pragma once

#include <exception>
#include <memory>
#include <string>

#include "ort/api.h"

namespace afpq::ort {

OrtStatus* make_status(const OrtApi* api, int code, const std::string& message);

template <typename Body>
OrtStatus* guarded(const OrtApi* api, const std::string& where, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return make_status(api, error.code, where + ": " + error.what());
  } catch (const std::exception& error) {
    return make_status(api, kFail, where + ": " + error.what());
  }
}

template <typename Kernel>
struct Instance {
  const OrtApi* api;
  std::string where;  // "afpq.MatMul node 'name'"
  std::unique_ptr<Kernel> kernel;
  Crew crew;
};

template <typename Kernel>
OrtCustomOp make_op() {
  OrtCustomOp op = {};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return Kernel::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) { return Kernel::input_type(index); };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return Kernel::kNumInputs; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return Kernel::kOutputType; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int {
    return index < Kernel::kNumRequired ? kRequired : kOptional;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info,
                         void** out) -> OrtStatus* {
    return guarded(api, std::string("afpq.") + Kernel::kName, [&] {
      const KernelInfo kernel_info(api, info);
      auto instance = std::make_unique<Instance<Kernel>>();
      instance->api = api;
      instance->where =
          std::string("afpq.") + Kernel::kName + " node '" + kernel_info.node_name() + "'";
      try {
        instance->kernel = std::make_unique<Kernel>(kernel_info);
      } catch (const Error& error) {
        throw Error(error.code, "node '" + kernel_info.node_name() + "': " + error.what());
      }
      *out = instance.release();
    });
  };
  op.KernelComputeV2 = [](void* self, OrtKernelContext* raw) -> OrtStatus* {
    auto* instance = static_cast<Instance<Kernel>*>(self);
    return guarded(instance->api, instance->where, [&] {
      KernelContext context(instance->api, raw, &instance->crew);
      instance->kernel->compute(context);
    });
  };
  op.KernelDestroy = [](void* self) { delete static_cast<Instance<Kernel>*>(self); };
  return op;
}

}  // namespace afpq::ort
