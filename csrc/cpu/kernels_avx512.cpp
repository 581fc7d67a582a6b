// The CPU kernels for AVX-512 (F, BW, VL, DQ); chosen at run time, so the build host need not have it.
#if defined(__x86_64__)

// Headers of the standard library come first, so that nothing in them is compiled for this target.
#include "kernels_std.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define NCE_SIMD_LEVEL 2
#define NCE_SIMD_NAMESPACE avx512
#include "kernels_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

const nce::Kernels nce::kKernelsAvx512 = nce::avx512::kTable;

#endif
