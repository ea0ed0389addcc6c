#include "kernels/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(AFPQ_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(AFPQ_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace afpq {
namespace {

int always() { return 1; }

#if defined(AFPQ_X86_64)
int has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}

int has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
#endif

#if defined(AFPQ_ARM64)
// Dot products of bytes, which came after the first 64-bit processors.
int has_neon() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP, which old headers lack
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value != 0;
#else
  return 0;
#endif
}
#endif

constexpr AfpqIsa kIsas[] = {
#if defined(AFPQ_X86_64)
    {&kAfpqKernelsAvx512Vnni, has_avx512vnni},
    {&kAfpqKernelsAvx2, has_avx2},
#endif
#if defined(AFPQ_ARM64)
    {&kAfpqKernelsNeon, has_neon},
#endif
    {&kAfpqKernelsScalar, always},
    {nullptr, nullptr},
};

std::string no_such_isa(const char* name) {
  std::string text =
      std::string("AFPQ_ISA: '") + name + "' is not an instruction set of this processor; it has ";
  const char* separator = "";
  for (const char* choice : isa_names()) {
    text.append(separator).append(choice);
    separator = ", ";
  }
  return text;
}

}  // namespace

std::vector<const char*> isa_names() {
  std::vector<const char*> names;
  for (const AfpqIsa* isa = kIsas; isa->kernels; ++isa) {
    if (isa->supported()) names.push_back(isa->kernels->isa);
  }
  return names;
}

const AfpqKernels* select_kernels(const char* name, const char** error) {
  const bool any = name == nullptr || *name == '\0';
  for (const AfpqIsa* isa = kIsas; isa->kernels; ++isa) {
    if ((any || std::strcmp(name, isa->kernels->isa) == 0) && isa->supported()) return isa->kernels;
  }
  thread_local std::string message;
  message = no_such_isa(name);
  *error = message.c_str();
  return nullptr;
}

const AfpqKernels* active_kernels(const char** error) {
  struct Active {
    const AfpqKernels* kernels;
    std::string error;
  };
  static const Active active = [] {
    const char* text = "";
    const AfpqKernels* kernels = select_kernels(std::getenv("AFPQ_ISA"), &text);
    return Active{kernels, text};
  }();
  if (active.kernels == nullptr) *error = active.error.c_str();
  return active.kernels;
}

}  // namespace afpq
