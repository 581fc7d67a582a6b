// Noise distributions: 64 random bits -> class id in integer arithmetic, and the log q of the realised law.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace nce {

enum class NoiseKind : int32_t { kUniform = 0, kLogUniform = 1, kAlias = 2 };

// One bucket of an alias table: a single 16-byte load gives the id and its log q.
struct alignas(16) AliasEntry {
  uint32_t threshold;  // the class of the bucket is drawn if the 32-bit fraction is below
  uint32_t alias;
  float log_q_self;
  float log_q_alias;
};

struct Noise {
  NoiseKind kind;
  int64_t n_classes;        // < 2^31
  const AliasEntry* table;  // kAlias
  double log2_range;        // kLogUniform: log2(V + 1)
  double log_log_range;     // kLogUniform: log(log1p(V))
  float log_q_uniform;      // kUniform: -log V
};

// All of a law but its table.
NCE_HD Noise noise_without_table(NoiseKind kind, int64_t n_classes) {
  const double n = static_cast<double>(n_classes);
  return Noise{kind, n_classes, nullptr, log2(n + 1.0), log(log1p(n)), static_cast<float>(-log(n))};
}

struct Draw {
  int32_t id;
  float log_q;
};

// A multiplication or an addition that no compiler may contract into a fused one: ids must agree to the last bit
// between processors with and without fused multiply-add. Host code is compiled with -ffp-contract=off.
NCE_HD double exact_multiply(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

NCE_HD double exact_add(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

// 2^t for t >= 0: Taylor series of 2^f, |f| <= 1/2, coefficients ln(2)^i / i!, error below 5e-18.
NCE_HD double exact_exp2(double t) {
  const double coefficients[14] = {
      1.0,
      0.6931471805599453,
      0.2402265069591007,
      0.055504108664821576,
      0.009618129107628477,
      0.0013333558146428441,
      0.00015403530393381606,
      1.5252733804059838e-05,
      1.3215486790144305e-06,
      1.0178086009239696e-07,
      7.054911620801121e-09,
      4.44553827187081e-10,
      2.5678435993488196e-11,
      1.3691488853904124e-12,
  };
  const double whole = floor(exact_add(t, 0.5));
  const double fraction = exact_add(t, -whole);
  double power = coefficients[13];
  for (int i = 12; i >= 0; --i) power = exact_add(exact_multiply(power, fraction), coefficients[i]);
  return ldexp(power, static_cast<int>(whole));
}

NCE_HD float log_q_log_uniform(const Noise& noise, int64_t id) {
  return static_cast<float>(log(log1p(1.0 / (static_cast<double>(id) + 1.0))) - noise.log_log_range);
}

// floor(bits * V / 2^64), and the next 32 bits of the quotient; V < 2^31, so nothing overflows.
struct Bucket {
  uint32_t index;
  uint32_t fraction;
};

NCE_HD Bucket bucket_of(const Noise& noise, uint64_t bits) {
  const uint64_t n = static_cast<uint64_t>(noise.n_classes);
  const uint64_t scaled = (bits >> 32) * n + (((bits & 0xFFFFFFFFu) * n) >> 32);
  return Bucket{static_cast<uint32_t>(scaled >> 32), static_cast<uint32_t>(scaled)};
}

NCE_HD int32_t log_uniform_id(const Noise& noise, uint64_t bits) {
  const double u = exact_multiply(static_cast<double>(bits >> 11), 0x1p-53);
  const int64_t id = static_cast<int64_t>(exact_exp2(exact_multiply(u, noise.log2_range))) - 1;
  return static_cast<int32_t>(id < 0 ? 0 : id < noise.n_classes ? id : noise.n_classes - 1);
}

NCE_HD Draw draw(const Noise& noise, uint64_t bits) {
  if (noise.kind == NoiseKind::kLogUniform) {
    const int32_t id = log_uniform_id(noise, bits);
    return Draw{id, log_q_log_uniform(noise, id)};
  }
  const Bucket bucket = bucket_of(noise, bits);
  if (noise.kind == NoiseKind::kUniform) return Draw{static_cast<int32_t>(bucket.index), noise.log_q_uniform};
  const AliasEntry entry = noise.table[bucket.index];
  const bool self = bucket.fraction < entry.threshold;
  return Draw{static_cast<int32_t>(self ? bucket.index : entry.alias), self ? entry.log_q_self : entry.log_q_alias};
}

NCE_HD float log_q(const Noise& noise, int64_t id) {
  if (noise.kind == NoiseKind::kUniform) return noise.log_q_uniform;
  if (noise.kind == NoiseKind::kLogUniform) return log_q_log_uniform(noise, id);
  return noise.table[id].log_q_self;
}

}  // namespace nce
