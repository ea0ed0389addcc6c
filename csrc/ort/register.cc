// The library's one exported symbol: registers the ops of the domain `afpq` with a session's
// options.
#include "ort/op.h"
#include "ort/ops.h"

namespace afpq::ort {

OrtStatus* make_status(const OrtApi* api, int code, const std::string& message) {
  constexpr size_t kCreateStatus = 0;
  return call<OrtStatus*(int, const char*)>(api, kCreateStatus)(code, message.c_str());
}

namespace {

constexpr size_t kCreateCustomOpDomain = 26, kCustomOpDomainAdd = 27, kAddCustomOpDomain = 28;

void register_ops(const OrtApi* api, OrtSessionOptions* options) {
  // The runtime keeps pointers to the ops for as long as a session lives: they are never destroyed.
  static const OrtCustomOp ops[] = {make_op<MatMulOp>(), make_op<ConvOp>(),
                                    make_op<ConvU8Op>(), make_op<GatherOp>(),
                                    make_op<UnpackOp>(), make_op<MaxPoolU8Op>()};
  static OrtCustomOpDomain* const domain = [api] {
    OrtCustomOpDomain* created = nullptr;
    check(api,
          call<OrtStatus*(const char*, OrtCustomOpDomain**)>(api, kCreateCustomOpDomain)("afpq",
                                                                                         &created),
          "domain afpq");
    for (const OrtCustomOp& op : ops) {
      check(api,
            call<OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>(api, kCustomOpDomainAdd)(
                created, &op),
            op.GetName(&op));
    }
    return created;
  }();
  check(api,
        call<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>(api, kAddCustomOpDomain)(options,
                                                                                          domain),
        "domain afpq");
}

}  // namespace
}  // namespace afpq::ort

extern "C" __attribute__((visibility("default"))) afpq::ort::OrtStatus* RegisterCustomOps(
    afpq::ort::OrtSessionOptions* options, const afpq::ort::OrtApiBase* base) {
  using namespace afpq::ort;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr)
    return nullptr;  // older than 1.17: nothing to register with; the model then fails to load
  note_version(api, base->GetVersionString());
  return guarded(api, "afpq", [&] { register_ops(api, options); });
}
