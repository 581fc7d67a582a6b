// The CPU kernels for AVX2 with FMA and F16C; chosen at run time, so the build host need not have it.
#if defined(__x86_64__)

// Headers of the standard library come first, so that nothing in them is compiled for this target.
#include "kernels_std.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define NCE_SIMD_LEVEL 1
#define NCE_SIMD_NAMESPACE avx2
#include "kernels_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

const nce::Kernels nce::kKernelsAvx2 = nce::avx2::kTable;

#endif
