// Alias tables with exact integer masses. Torch-free.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "../noise.h"

namespace nce {

constexpr uint64_t kFull = uint64_t{1} << 32;  // mass of one bucket

// Integer masses that sum to V 2^32: at least 1 for a positive weight, 0 for 0, the rounding residue on the heaviest.
inline std::unique_ptr<uint64_t[]> quantise_masses(const double* weights, int64_t n, double scale) {
  std::unique_ptr<uint64_t[]> mass(new uint64_t[n]);
  uint64_t total = 0;
  int64_t heaviest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double exact = weights[i] * scale;
    if (!(exact >= 0 && exact < 0x1p63)) {
      throw std::invalid_argument("weights must be finite and >= 0, got " + std::to_string(weights[i]) + " at index " +
                                  std::to_string(i));
    }
    const auto rounded = static_cast<uint64_t>(std::llrint(exact));
    mass[i] = rounded == 0 && weights[i] > 0 ? 1 : rounded;
    total += mass[i];
    if (mass[i] > mass[heaviest]) heaviest = i;
  }
  const uint64_t residue = static_cast<uint64_t>(n) * kFull - total;  // modulo 2^64: may be negative
  const auto size = static_cast<int64_t>(residue);
  if (size > 2 * n || size < -2 * n || (size < 0 && mass[heaviest] <= static_cast<uint64_t>(-size))) {
    throw std::invalid_argument("scale must make the weights sum to V 2^32; they miss it by " + std::to_string(size));
  }
  mass[heaviest] += residue;
  return mass;
}

// One sweep with a pointer to the next light and one to the next heavy class. `rest` is what the current heavy class
// still holds; once that is below a full bucket the class is itself filled up by the next heavy one.
inline void fill_buckets(const uint64_t* mass, int64_t n, AliasEntry* table) {
  for (int64_t i = 0; i < n; ++i) {
    table[i].threshold = 0xFFFFFFFFu;  // a full bucket: threshold 2^32 does not fit, so the alias is the class itself
    table[i].alias = static_cast<uint32_t>(i);
  }
  const auto next_heavy = [&](int64_t i) {
    while (i < n && mass[i] <= kFull) ++i;
    return i;
  };
  int64_t heavy = next_heavy(0);
  if (heavy == n) return;
  uint64_t rest = mass[heavy];
  for (int64_t light = 0; light < n; ++light) {
    if (mass[light] >= kFull) continue;
    table[light].threshold = static_cast<uint32_t>(mass[light]);
    table[light].alias = static_cast<uint32_t>(heavy);
    rest -= kFull - mass[light];
    while (rest < kFull) {
      const int64_t next = next_heavy(heavy + 1);
      table[heavy].threshold = static_cast<uint32_t>(rest);
      table[heavy].alias = static_cast<uint32_t>(next);
      rest = mass[next] - (kFull - rest);
      heavy = next;
    }
    if (rest == kFull) {
      heavy = next_heavy(heavy + 1);
      if (heavy == n) break;
      rest = mass[heavy];
    }
  }
}

}  // namespace nce
