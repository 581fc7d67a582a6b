// CUDA's spellings for kernels that g++ compiles and emulator::launch runs on the host; see scheduler.h for how.
//
// What a launch reports as emulator::Error is stricter than the hardware in two places: a mask or a block barrier that
// waits for an exited thread is an error, and so is a mask that names lanes beyond a block's last thread.
//
// __shared__ is left undefined: kernels take emulator::shared_memory(), which is of exact size and filled with NaNs.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>  // before __noinline__ is a macro, since libstdc++ has it as the name of an attribute
#include <type_traits>
#include <utility>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

namespace emulator {

inline void seed(uint64_t state) { detail::scheduler.random.seed(state); }

// How often a thread was resumed, since the program began.
inline uint64_t switches() { return detail::scheduler.switches; }

// The block's dynamic shared memory, null if it has none and outside a kernel.
inline void* shared_memory() { return detail::scheduler.shared_memory(); }

// Every thread calls `kernel` with copies of the arguments, where it takes them by value.
template <class Kernel, class... Args>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Kernel&& kernel, Args... args) {
  detail::scheduler.run_grid(grid, block, shared_bytes, [&] { kernel(std::as_const(args)...); });
}

namespace detail {

inline uint64_t vote(Op op, uint32_t mask, int predicate) {
  return scheduler.collective({.op = op, .mask = mask, .value = predicate != 0});
}

template <class T>
T shuffle(Op op, uint32_t mask, T value, unsigned operand, int width) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  Call call{.op = op, .mask = mask, .bytes = sizeof(T), .operand = operand, .width = static_cast<unsigned>(width)};
  std::memcpy(&call.value, &value, sizeof(T));
  const uint64_t result = scheduler.collective(call);
  std::memcpy(&value, &result, sizeof(T));
  return value;
}

}  // namespace detail
}  // namespace emulator

inline const uint3& threadIdx = emulator::detail::thread_index;
inline const uint3& blockIdx = emulator::detail::block_index;
inline const dim3& blockDim = emulator::detail::block_shape;
inline const dim3& gridDim = emulator::detail::grid_shape;
constexpr int warpSize = emulator::detail::kWarpSize;

#define EMULATOR_VECTOR2(name, T, alignment) \
  struct alignas(alignment) name {           \
    T x, y;                                  \
  };                                         \
  inline name make_##name(T x, T y) { return name{x, y}; }
#define EMULATOR_VECTOR4(name, T, alignment) \
  struct alignas(alignment) name {           \
    T x, y, z, w;                            \
  };                                         \
  inline name make_##name(T x, T y, T z, T w) { return name{x, y, z, w}; }
EMULATOR_VECTOR2(float2, float, 8)
EMULATOR_VECTOR2(uint2, unsigned, 8)
EMULATOR_VECTOR2(double2, double, 16)
EMULATOR_VECTOR2(longlong2, long long, 16)
EMULATOR_VECTOR4(float4, float, 16)
EMULATOR_VECTOR4(uint4, unsigned, 16)
EMULATOR_VECTOR4(int4, int, 16)
#undef EMULATOR_VECTOR2
#undef EMULATOR_VECTOR4

inline void __syncthreads() { emulator::detail::scheduler.collective({.op = emulator::detail::Op::kSyncthreads}); }
inline int __syncthreads_or(int predicate) {
  return static_cast<int>(emulator::detail::vote(emulator::detail::Op::kSyncthreadsOr, 0, predicate));
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF) {
  emulator::detail::scheduler.collective({.op = emulator::detail::Op::kSyncwarp, .mask = mask});
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(emulator::detail::vote(emulator::detail::Op::kBallot, mask, predicate));
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(emulator::detail::vote(emulator::detail::Op::kAny, mask, predicate));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(emulator::detail::vote(emulator::detail::Op::kAll, mask, predicate));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  return emulator::detail::shuffle(emulator::detail::Op::kShfl, mask, value, static_cast<unsigned>(lane), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_bits, int width = warpSize) {
  return emulator::detail::shuffle(emulator::detail::Op::kShflXor, mask, value, static_cast<unsigned>(lane_bits),
                                   width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = warpSize) {
  return emulator::detail::shuffle(emulator::detail::Op::kShflUp, mask, value, distance, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = warpSize) {
  return emulator::detail::shuffle(emulator::detail::Op::kShflDown, mask, value, distance, width);
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

template <class T>
T __ldg(const T* p) {
  return *p;
}

#define EMULATOR_MIN_MAX(T)                        \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
// Of a NaN and a number, the number.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

namespace emulator::detail {

template <class T>
T exchange_sum(T* address, T value) {
  const T old = *address;
  if constexpr (std::is_integral_v<T>) {  // wraps around
    *address = static_cast<T>(static_cast<unsigned>(old) + static_cast<unsigned>(value));
  } else {
    *address = old + value;
  }
  return old;
}

}  // namespace emulator::detail

inline float atomicAdd(float* address, float value) { return emulator::detail::exchange_sum(address, value); }
inline double atomicAdd(double* address, double value) { return emulator::detail::exchange_sum(address, value); }
inline int atomicAdd(int* address, int value) { return emulator::detail::exchange_sum(address, value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return emulator::detail::exchange_sum(address, value); }
