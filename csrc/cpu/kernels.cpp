#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace nce {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

const Kernels& choose() {
  const char* environment = std::getenv("NCE_EXT_SIMD");
  const std::string wanted = environment ? environment : "";
#if defined(__x86_64__)
  if (wanted == "avx512" || wanted.empty()) {
    if (has_avx512()) return kKernelsAvx512;
  }
  if (wanted == "avx2" || wanted.empty()) {
    if (has_avx2()) return kKernelsAvx2;
  }
#endif
  if (wanted == "generic" || wanted.empty()) return kKernelsGeneric;
  const bool known = wanted == "avx2" || wanted == "avx512";
  throw std::runtime_error("NCE_EXT_SIMD must be generic, avx2 or avx512, got " + wanted +
                           (known ? ", which this processor does not support" : ""));
}

}  // namespace

bool streams_rows(int64_t row_bytes) {
#if defined(__x86_64__)
  constexpr int64_t kLongRow = 1024;
  static const bool amd = __builtin_cpu_is("amd");
  return amd && row_bytes >= kLongRow;
#else
  return false;
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace nce
