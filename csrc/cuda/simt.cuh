// CUDA's own vocabulary for kernels, from nvcc or, in a build for the host, from an emulator of the grid.
//
// Kernels use it and the wrappers below, and include neither torch nor CUB: whoever compiles them with
// -I<folder of an emulator.h> can run them without a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulator.h"
#endif

namespace nce::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

struct alignas(16) Vector {
  uint32_t word[4];
};

// This warp's index in its block. Read from a lane, so that the compiler knows that all lanes have the same.
__device__ __forceinline__ int warp_of_block() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);
}

// The block's shared memory. Its size is the launch's; all of it is dynamic.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#else
  return static_cast<T*>(emulator::shared_memory());
#endif
}

// Reads of memory that nothing writes while the kernel runs; zero, and no access, unless `wanted`. Rows of the table
// are used once: they would only push out of the first-level cache what is used again. The predicate is part of the
// instruction, because a branch around it would keep several loads from being in flight together.
__device__ __forceinline__ Vector read_once16(const void* at, bool wanted = true) {
#if defined(__CUDACC__)
  Vector v;
  asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %5, 0;\n\t"
      "mov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
      "@p ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=&r"(v.word[0]), "=&r"(v.word[1]), "=&r"(v.word[2]), "=&r"(v.word[3])
      : "l"(at), "r"(static_cast<int>(wanted)));
  return v;
#else
  return wanted ? *static_cast<const Vector*>(at) : Vector{{0, 0, 0, 0}};
#endif
}

__device__ __forceinline__ uint2 read_once8(const void* at, bool wanted = true) {
#if defined(__CUDACC__)
  uint2 v;
  asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %3, 0;\n\t"
      "mov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\t"
      "@p ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];\n\t}"
      : "=&r"(v.x), "=&r"(v.y)
      : "l"(at), "r"(static_cast<int>(wanted)));
  return v;
#else
  return wanted ? *static_cast<const uint2*>(at) : uint2{0, 0};
#endif
}

template <class T>
__device__ __forceinline__ T read_once(const T* at) {
  return __ldg(at);
}

// An ordinary read of 16 bytes, by one instruction: of a Vector the compiler makes four.
__device__ __forceinline__ Vector read16(const void* at) {
  const uint4 words = *static_cast<const uint4*>(at);
  return Vector{{words.x, words.y, words.z, words.w}};
}

// A read of memory that other threads may be changing: some value that was there, never from a cache that could keep
// an old one for good.
template <class T>
__device__ __forceinline__ T read_changing(const T* at) {
  return *const_cast<const volatile T*>(at);
}

__device__ __forceinline__ Vector read_changing16(const void* at, bool wanted) {
#if defined(__CUDACC__)
  Vector v;
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %5, 0;\n\t"
      "mov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
      "@p ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=&r"(v.word[0]), "=&r"(v.word[1]), "=&r"(v.word[2]), "=&r"(v.word[3])
      : "l"(at), "r"(static_cast<int>(wanted))
      : "memory");
  return v;
#else
  return wanted ? *static_cast<const Vector*>(at) : Vector{{0, 0, 0, 0}};
#endif
}

// at[0 .. 3] += value, each element for itself, in no order with other threads' additions. `at` is aligned to 16 bytes.
__device__ __forceinline__ void add_in_place4(float* at, const float* value) {
#if defined(__CUDACC__) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(at), "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i) atomicAdd(at + i, value[i]);
#endif
}

}  // namespace nce::cuda
