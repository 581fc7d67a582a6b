// Marks the mathematics that every backend shares: CPU kernels, CUDA kernels and the host emulator.
//
// static and always inline: the CPU kernels are compiled once per instruction set, and an ordinary inline function
// would be merged across those copies, so that the generic path could end up running AVX-512 code.
#pragma once

#if defined(__CUDACC__)
#define NCE_HD static __host__ __device__ __forceinline__
#else
#define NCE_HD static inline __attribute__((always_inline))
#endif
