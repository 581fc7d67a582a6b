// Elements in memory and in registers: storage types, their conversions, and 16 bytes of a row at a time.
#pragma once

#include <type_traits>

#include "../sampled_loss.h"
#include "simt.cuh"

namespace nce::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// What a stored element is computed in.
template <class Stored>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class Stored>
using Compute = typename ComputeOf<Stored>::Type;

template <class Stored>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(Stored));

__device__ __forceinline__ float half_to_float(uint16_t bits) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(bits));
#else
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
#endif
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
#if defined(__CUDACC__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
#endif
}

__device__ __forceinline__ uint16_t float_to_bfloat16(float value) {
#if defined(__CUDACC__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
#endif
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(Half value) { return half_to_float(value.bits); }

__device__ __forceinline__ void narrow(float value, float* out) { *out = value; }
__device__ __forceinline__ void narrow(double value, double* out) { *out = value; }
__device__ __forceinline__ void narrow(float value, BFloat16* out) { out->bits = float_to_bfloat16(value); }
__device__ __forceinline__ void narrow(float value, Half* out) { out->bits = float_to_half(value); }

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// The elements of a vector.
template <class Stored>
struct Unpacked {
  Compute<Stored> element[kPerVector<Stored>];
};

template <class Stored>
__device__ __forceinline__ Unpacked<Stored> unpack(const Vector& v) {
  Unpacked<Stored> out;
  if constexpr (sizeof(Stored) == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64_t bits = (static_cast<uint64_t>(v.word[2 * i + 1]) << 32) | v.word[2 * i];
      std::memcpy(&out.element[i], &bits, 8);
    }
  } else if constexpr (sizeof(Stored) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out.element[i] = __uint_as_float(v.word[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<Stored, BFloat16>) {
        out.element[2 * i] = __uint_as_float(v.word[i] << 16);
        out.element[2 * i + 1] = __uint_as_float(v.word[i] & 0xFFFF0000u);
      } else {
        out.element[2 * i] = half_to_float(static_cast<uint16_t>(v.word[i]));
        out.element[2 * i + 1] = half_to_float(static_cast<uint16_t>(v.word[i] >> 16));
      }
    }
  }
  return out;
}

// How a row may be read: by 16 or 8 bytes where its address, its stride and its length are multiples of that, else
// element by element. The choice changes no value and no order of arithmetic.
enum class Access : int { kElements = 0, kBytes8 = 8, kBytes16 = 16 };

inline Access access_of(const void* base, int64_t stride_bytes, int64_t row_bytes) {
  const auto all =
      reinterpret_cast<uintptr_t>(base) | static_cast<uintptr_t>(stride_bytes) | static_cast<uintptr_t>(row_bytes);
  return all % 16 == 0 ? Access::kBytes16 : all % 8 == 0 ? Access::kBytes8 : Access::kElements;
}

// Calls f(access as a constant).
template <class Stored, class F>
void with_access(Access access, F&& f) {
  if constexpr (sizeof(Stored) < 8) {
    if (access == Access::kElements) return f(std::integral_constant<Access, Access::kElements>{});
  }
  if (access == Access::kBytes16) return f(std::integral_constant<Access, Access::kBytes16>{});
  return f(std::integral_constant<Access, Access::kBytes8>{});  // as are single elements of 8 bytes
}

// Calls f(a value of the stored type).
template <class F>
void with_stored(Storage storage, F&& f) {
  switch (storage) {
    case Storage::kFloat:
      return f(float{});
    case Storage::kBFloat16:
      return f(BFloat16{});
    case Storage::kHalf:
      return f(Half{});
    case Storage::kDouble:
      return f(double{});
  }
}

// 16 bytes of a row from byte `at` on; zero beyond `row_bytes`, and all of it unless `wanted`.
template <class Stored, Access kAccess>
__device__ __forceinline__ Vector load_vector(const char* row, int at, int row_bytes, bool wanted) {
  const int end = wanted ? row_bytes : 0;
  if constexpr (kAccess == Access::kBytes16) {
    return read_once16(row + at, at < end);
  } else if constexpr (kAccess == Access::kBytes8) {
    const uint2 low = read_once8(row + at, at < end), high = read_once8(row + at + 8, at + 8 < end);
    return Vector{{low.x, low.y, high.x, high.y}};
  } else {
    using Word = std::conditional_t<sizeof(Stored) == 2 && kAccess == Access::kElements, uint16_t, uint32_t>;
    static_assert(sizeof(Stored) < 8 || kAccess != Access::kElements, "8-byte elements are read by 8 bytes");
    Vector v{{0, 0, 0, 0}};
#pragma unroll
    for (int i = 0; i < 16 / static_cast<int>(sizeof(Word)); ++i) {
      const int byte = i * static_cast<int>(sizeof(Word));
      if (at + byte < end) {
        const auto* source = reinterpret_cast<const Word*>(row + at + byte);
        const uint32_t bits = read_once(source);
        v.word[byte / 4] |= bits << (8 * (byte % 4));
      }
    }
    return v;
  }
}

template <int kCount, class Stored, class Real>
__device__ __forceinline__ void load_elements_of(const Stored* row, int first, int dim, bool wide, Real* out) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(Stored));
  if (wide) {
    if (first < dim) {
      if constexpr (kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i) {
          constexpr int kElements = kPerVector<Stored>;
          const auto part = unpack<Stored>(*(reinterpret_cast<const Vector*>(row + first) + i));
#pragma unroll
          for (int e = 0; e < kElements; ++e) out[i * kElements + e] = part.element[e];
        }
      } else {
        static_assert(kBytes == 8 && sizeof(Stored) == 2);
        const uint2 words = *reinterpret_cast<const uint2*>(row + first);
        const auto part = unpack<Stored>(Vector{{words.x, words.y, 0, 0}});
#pragma unroll
        for (int e = 0; e < 4; ++e) out[e] = part.element[e];
      }
      return;
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) out[e] = Real(0);
    return;
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) out[e] = first + e < dim ? static_cast<Real>(widen(row[first + e])) : Real(0);
}

// Elements first .. first + kCount - 1 of a row of any storage, zero beyond dim. `wide`: wide_rows() holds.
template <int kCount, class Real>
__device__ __forceinline__ void load_elements(const void* rows, int64_t offset, Storage storage, int first, int dim,
                                              bool wide, Real* out) {
  if constexpr (sizeof(Real) == 8) {
    load_elements_of<kCount>(static_cast<const double*>(rows) + offset, first, dim, wide, out);
  } else if (storage == Storage::kFloat) {
    load_elements_of<kCount>(static_cast<const float*>(rows) + offset, first, dim, wide, out);
  } else if (storage == Storage::kBFloat16) {
    load_elements_of<kCount>(static_cast<const BFloat16*>(rows) + offset, first, dim, wide, out);
  } else {
    load_elements_of<kCount>(static_cast<const Half*>(rows) + offset, first, dim, wide, out);
  }
}

// Elements first .. first + kCount - 1 of a row, as far as it has them. kWide: they lie at a multiple of 16 bytes, or
// of their size if that is less, and the row has all of them or none.
template <int kCount, bool kWide, class Stored>
__device__ __forceinline__ void store_elements_of(Stored* row, int first, int dim, const Stored* values) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(Stored));
  if constexpr (!kWide) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (first + e < dim) row[first + e] = values[e];
    }
  } else if constexpr (kBytes == 8) {
    uint2 words;
    std::memcpy(&words, values, 8);
    if (first < dim) *reinterpret_cast<uint2*>(row + first) = words;
  } else {
    static_assert(kBytes % 16 == 0);
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      Vector words;
      std::memcpy(words.word, values + i * kPerVector<Stored>, 16);
      if (first < dim) reinterpret_cast<Vector*>(row + first)[i] = words;
    }
  }
}

// Whether every run of `count` elements of every row can be read by vectors.
__device__ __forceinline__ bool wide_rows(const void* base, int64_t stride, int64_t dim, Storage storage, int count) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * bytes_of(storage) % 16 == 0 && dim % count == 0;
}

}  // namespace nce::cuda
