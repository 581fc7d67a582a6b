// Vectors of 16 lanes over the instruction set of the including translation unit.
//
// Every level computes on the same 16 lanes and reduces them in the same order, so levels that fuse multiply-adds
// (AVX2, AVX-512) agree to the last bit. Include only from kernels_<level>.cpp, after NCE_SIMD_LEVEL and
// NCE_SIMD_NAMESPACE are set and the target is chosen.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if NCE_SIMD_LEVEL > 0
#include <immintrin.h>
#endif

#define NCE_INLINE static inline __attribute__((always_inline))
#define NCE_INLINE_LAMBDA __attribute__((always_inline))

namespace nce::NCE_SIMD_NAMESPACE {

constexpr int kLanes = 16;
constexpr int kNativeBytes = NCE_SIMD_LEVEL == 2 ? 64 : NCE_SIMD_LEVEL == 1 ? 32 : 16;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T, int kCount>
struct Native {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

// f(0), ..., f(n - 1) with the index as a compile-time constant. A plain loop is unrolled too late for the compiler to
// keep an array that it indexes in registers.
template <class Function, int... kIndex>
NCE_INLINE void unroll_indices(std::integer_sequence<int, kIndex...>, const Function& f) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, class Function>
NCE_INLINE void unroll(const Function& f) {
  unroll_indices(std::make_integer_sequence<int, kCount>{}, f);
}

template <class Real>
struct Vec {
  static constexpr int kPartLanes = kNativeBytes / sizeof(Real);
  static constexpr int kParts = kLanes / kPartLanes;
  using Part = typename Native<Real, kPartLanes>::type;
  using Indices = std::make_index_sequence<kParts>;
  Part part[kParts];

  Vec() = default;
  NCE_INLINE_LAMBDA inline explicit Vec(Real value) {
    unroll<kParts>([&](auto i) NCE_INLINE_LAMBDA { part[i] = Part{} + value; });
  }
};

template <class Real, class Function, size_t... kIndex, class... Args>
NCE_INLINE Vec<Real> map_parts(std::index_sequence<kIndex...>, Function f, const Args&... args) {
  Vec<Real> result;
  const auto one = [&](size_t i) NCE_INLINE_LAMBDA { result.part[i] = f(args.part[i]...); };
  (one(kIndex), ...);
  return result;
}

template <class Real, class Function, class... Args>
NCE_INLINE Vec<Real> map(Function f, const Vec<Real>& first, const Args&... rest) {
  return map_parts<Real>(typename Vec<Real>::Indices{}, f, first, rest...);
}

template <class Real>
NCE_INLINE Vec<Real> operator+(const Vec<Real>& a, const Vec<Real>& b) {
  return map([](auto p, auto q) NCE_INLINE_LAMBDA { return p + q; }, a, b);
}
template <class Real>
NCE_INLINE Vec<Real> operator-(const Vec<Real>& a, const Vec<Real>& b) {
  return map([](auto p, auto q) NCE_INLINE_LAMBDA { return p - q; }, a, b);
}
template <class Real>
NCE_INLINE Vec<Real> operator*(const Vec<Real>& a, const Vec<Real>& b) {
  return map([](auto p, auto q) NCE_INLINE_LAMBDA { return p * q; }, a, b);
}
template <class Real>
NCE_INLINE Vec<Real> operator/(const Vec<Real>& a, const Vec<Real>& b) {
  return map([](auto p, auto q) NCE_INLINE_LAMBDA { return p / q; }, a, b);
}

#if NCE_SIMD_LEVEL == 2
NCE_INLINE __m512 fma_part(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
NCE_INLINE __m512d fma_part(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif NCE_SIMD_LEVEL == 1
NCE_INLINE __m256 fma_part(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
NCE_INLINE __m256d fma_part(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#else
template <class Part>
NCE_INLINE Part fma_part(Part a, Part b, Part c) {
  return a * b + c;
}
#endif

template <class Real>
NCE_INLINE Vec<Real> fma(const Vec<Real>& a, const Vec<Real>& b, const Vec<Real>& c) {
  return map([](auto p, auto q, auto r) NCE_INLINE_LAMBDA { return fma_part(p, q, r); }, a, b, c);
}

// Halves are taken by instruction, not through memory, which would keep the whole vector there.
NCE_INLINE float sum_native(Native<float, 4>::type v) { return (v[0] + v[2]) + (v[1] + v[3]); }
NCE_INLINE double sum_native(Native<double, 2>::type v) { return v[0] + v[1]; }
#if NCE_SIMD_LEVEL > 0
NCE_INLINE float sum_native(__m256 v) { return sum_native(_mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1)); }
NCE_INLINE double sum_native(__m256d v) { return sum_native(_mm256_castpd256_pd128(v) + _mm256_extractf128_pd(v, 1)); }
#endif
#if NCE_SIMD_LEVEL == 2
NCE_INLINE float sum_native(__m512 v) { return sum_native(_mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1)); }
NCE_INLINE double sum_native(__m512d v) { return sum_native(_mm512_castpd512_pd256(v) + _mm512_extractf64x4_pd(v, 1)); }
#endif

// Halves are added until one lane is left: (i, i + 8), (i, i + 4), ...
template <int kWidth, class Real>
NCE_INLINE void fold_parts(Vec<Real>& v) {
  if constexpr (kWidth > 0) {
    unroll<kWidth>([&](auto i) NCE_INLINE_LAMBDA { v.part[i] = v.part[i] + v.part[i + kWidth]; });
    fold_parts<kWidth / 2>(v);
  }
}

template <class Real>
NCE_INLINE Real sum(Vec<Real> v) {
  fold_parts<Vec<Real>::kParts / 2>(v);
  return sum_native(v.part[0]);
}

template <class Real>
NCE_INLINE Vec<Real> load(const Real* p) {
  Vec<Real> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class Real>
NCE_INLINE void store(Real* p, const Vec<Real>& v) {
  std::memcpy(p, &v, sizeof(v));
}

// 16-bit storage. bfloat16 is the upper half of a float; float16 has instructions from AVX2's generation on.
NCE_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7FFFu;
  float value;
  uint32_t bits = (rest << 13) + (112u << 23);  // rebias the exponent by 127 - 15
  if (rest >= 0x7C00u) bits += 112u << 23;      // infinity and NaN
  std::memcpy(&value, &bits, 4);
  if (rest < 0x0400u) value = static_cast<float>(rest) * 0x1p-24f;  // subnormal
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

NCE_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to 2^16 or above
  if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 leaves the rounded fraction in the low bits
    float shifted;
    std::memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    uint32_t fraction;
    std::memcpy(&fraction, &shifted, 4);
    return static_cast<uint16_t>(sign | (fraction - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13));
}

NCE_INLINE Vec<float> load(const BFloat16* p) {
  constexpr int kPartLanes = Vec<float>::kPartLanes;
  Vec<float> v;
  for (int i = 0; i < Vec<float>::kParts; ++i) {
    typename Native<uint16_t, kPartLanes>::type narrow;
    std::memcpy(&narrow, p + i * kPartLanes, sizeof(narrow));
    const auto wide = __builtin_convertvector(narrow, typename Native<uint32_t, kPartLanes>::type) << 16;
    std::memcpy(&v.part[i], &wide, sizeof(wide));
  }
  return v;
}

NCE_INLINE void store(BFloat16* p, const Vec<float>& v) {
  constexpr int kPartLanes = Vec<float>::kPartLanes;
  for (int i = 0; i < Vec<float>::kParts; ++i) {
    typename Native<uint32_t, kPartLanes>::type bits;
    std::memcpy(&bits, &v.part[i], sizeof(bits));
    const auto rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const auto quiet = (bits >> 16) | 0x0040u;
    const auto chosen = (bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded;
    const auto narrow = __builtin_convertvector(chosen, typename Native<uint16_t, kPartLanes>::type);
    std::memcpy(p + i * kPartLanes, &narrow, sizeof(narrow));
  }
}

NCE_INLINE Vec<float> load(const Half* p) {
  Vec<float> v;
#if NCE_SIMD_LEVEL == 2
  v.part[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif NCE_SIMD_LEVEL == 1
  for (int i = 0; i < 2; ++i) {
    v.part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
  }
#else
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = half_to_float(p[i].bits);
  v = load(lanes);
#endif
  return v;
}

NCE_INLINE void store(Half* p, const Vec<float>& v) {
#if NCE_SIMD_LEVEL == 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif NCE_SIMD_LEVEL == 1
  for (int i = 0; i < 2; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), _mm256_cvtps_ph(v.part[i], _MM_FROUND_TO_NEAREST_INT));
  }
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(lanes[i]);
#endif
}

// The first n < 16 lanes; the others read as 0 and are not touched in memory.
template <class Stored>
NCE_INLINE auto load_first(const Stored* p, int64_t n) {
  Stored lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(Stored));
  return load(lanes);
}

template <class Stored, class Real>
NCE_INLINE void store_first(Stored* p, const Vec<Real>& v, int64_t n) {
  Stored lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(Stored));
}

NCE_INLINE float load_one(const float* p) { return *p; }
NCE_INLINE double load_one(const double* p) { return *p; }
NCE_INLINE float load_one(const Half* p) { return half_to_float(p->bits); }
NCE_INLINE float load_one(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

#if NCE_SIMD_LEVEL == 2
NCE_INLINE Vec<float> load_first(const float* p, int64_t n) {
  Vec<float> v;
  v.part[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
  return v;
}
NCE_INLINE void store_first(float* p, const Vec<float>& v, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), v.part[0]);
}
#endif

// Past the cache: a gradient row is written once and next read by an optimizer, long after it would be evicted.
// p must be aligned to a vector.
NCE_INLINE void stream(float* p, const Vec<float>& v) {
#if NCE_SIMD_LEVEL == 2
  _mm512_stream_ps(p, v.part[0]);
#elif NCE_SIMD_LEVEL == 1
  for (int i = 0; i < 2; ++i) _mm256_stream_ps(p + 8 * i, v.part[i]);
#else
  store(p, v);
#endif
}

// What objective.h needs of a number, for vectors.
template <class Real>
NCE_INLINE Vec<Real> magnitude(const Vec<Real>& z) {
  return map([](auto p) NCE_INLINE_LAMBDA { return p < 0 ? -p : p; }, z);
}
template <class Real>
NCE_INLINE Vec<Real> max_zero(const Vec<Real>& z) {
  return map([](auto p) NCE_INLINE_LAMBDA { return p > 0 ? p : decltype(p){}; }, z);
}
template <class Real>
NCE_INLINE Vec<Real> clamp_finite(const Vec<Real>& z) {
  const Real limit = sizeof(Real) == 4 ? static_cast<Real>(FLT_MAX) : static_cast<Real>(DBL_MAX);
  const auto clamp = [](auto p, auto high) NCE_INLINE_LAMBDA {
    const auto below = p > high ? high : p;
    return below < -high ? -high : below;
  };
  return map(clamp, z, Vec<Real>(limit));
}
template <class Real>
NCE_INLINE Vec<Real> select_nonnegative(const Vec<Real>& z, const Vec<Real>& yes, const Vec<Real>& no) {
  return map([](auto p, auto y, auto n) NCE_INLINE_LAMBDA { return p >= 0 ? y : n; }, z, yes, no);
}

// exp(-a), a >= 0, relative error below 2e-7: -a = n ln2 + r with ln2 in two parts, Taylor to r^7 on |r| <= ln2 / 2.
// Beyond 87.3 the result is no normal float; it stays at the last one, and a NaN stays NaN.
NCE_INLINE Vec<float> exp_negative(const Vec<float>& a) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  using Bits = Native<int32_t, Vec<float>::kPartLanes>::type;
  const auto clamp = [](auto p) NCE_INLINE_LAMBDA { return p > 87.3f ? decltype(p){} + 87.3f : p; };
  const Vec<float> x = Vec<float>(0.0f) - map(clamp, a);
  const Vec<float> n = fma(x, Vec<float>(1.44269504f), Vec<float>(kRound)) - Vec<float>(kRound);
  Vec<float> r = fma(n, Vec<float>(-0.693145752f), x);
  r = fma(n, Vec<float>(-1.42860677e-6f), r);
  Vec<float> p = Vec<float>(1.98412698e-4f);
  for (const float c : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) {
    p = fma(p, r, Vec<float>(c));
  }
  const auto scale = [](auto value, auto exponent) NCE_INLINE_LAMBDA {
    const Bits bits = (__builtin_convertvector(exponent, Bits) + 127) << 23;
    decltype(value) power;
    std::memcpy(&power, &bits, sizeof(power));
    return value * power;
  };
  return map(scale, p, n);
}

// log(1 + e) = 2 atanh(e / (2 + e)), 0 <= e <= 1, relative error below 2e-7.
template <class Real>
NCE_INLINE Vec<Real> reciprocal(const Vec<Real>& x) {
  return Vec<Real>(Real(1)) / x;
}

NCE_INLINE Vec<float> log1p_unit(const Vec<float>& e) {
  const Vec<float> s = e / (e + Vec<float>(2.0f));
  const Vec<float> square = s * s;
  Vec<float> p = Vec<float>(2.0f / 13);
  for (const float c : {2.0f / 11, 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f}) p = fma(p, square, Vec<float>(c));
  return p * s;
}

// Double serves gradient checks: exact library functions, lane by lane.
template <class Function>
NCE_INLINE Vec<double> map_lanes(Function f, const Vec<double>& v) {
  double lanes[kLanes];
  store(lanes, v);
  for (double& lane : lanes) lane = f(lane);
  return load(lanes);
}
NCE_INLINE Vec<double> exp_negative(const Vec<double>& a) {
  return map_lanes([](double lane) NCE_INLINE_LAMBDA { return ::exp(-lane); }, a);
}
NCE_INLINE Vec<double> log1p_unit(const Vec<double>& e) {
  return map_lanes([](double lane) NCE_INLINE_LAMBDA { return ::log1p(lane); }, e);
}

}  // namespace nce::NCE_SIMD_NAMESPACE
