// Builds alias tables with exact integer masses.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <memory>

#include "../check.h"
#include "../noise.h"

namespace nce {
namespace {

constexpr uint64_t kFull = uint64_t{1} << 32;  // mass of one bucket
constexpr int64_t kGrain = 1 << 16;

// Integer masses that sum to V 2^32: at least 1 for a positive weight, 0 for 0, the rounding residue on the heaviest.
std::unique_ptr<uint64_t[]> quantise(const double* weights, int64_t n, double scale) {
  std::unique_ptr<uint64_t[]> mass(new uint64_t[n]);
  uint64_t total = 0;
  int64_t heaviest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double exact = weights[i] * scale;
    STD_TORCH_CHECK(exact >= 0 && exact < 0x1p63, "weights must be finite and >= 0, got ", weights[i], " at index ", i);
    const auto rounded = static_cast<uint64_t>(static_cast<int64_t>(std::nearbyint(exact)));
    mass[i] = rounded == 0 && weights[i] > 0 ? 1 : rounded;
    total += mass[i];
    if (mass[i] > mass[heaviest]) heaviest = i;
  }
  const uint64_t residue = static_cast<uint64_t>(n) * kFull - total;  // modulo 2^64: may be negative
  const auto size = static_cast<int64_t>(residue);
  STD_TORCH_CHECK(size <= 2 * n && size >= -2 * n && (size >= 0 || mass[heaviest] > static_cast<uint64_t>(-size)),
                  "scale must make the weights sum to V 2^32; they miss it by ", size);
  mass[heaviest] += residue;
  return mass;
}

// One sweep with a pointer to the next light and one to the next heavy class. `rest` is what the current heavy class
// still holds; once that is below a full bucket the class is itself filled up by the next heavy one.
void fill(const uint64_t* mass, int64_t n, AliasEntry* table) {
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

Tensor alias_table(Tensor weights, double scale) {
  check_dtype("weights", weights, ScalarType::Double);
  STD_TORCH_CHECK(weights.dim() == 1 && weights.is_contiguous(), "weights must be 1-D and contiguous");
  const int64_t n = weights.size(0);
  STD_TORCH_CHECK(n >= 1 && n < (int64_t{1} << 31), "weights must have 1 .. 2^31 - 1 entries, got ", n);

  const auto mass = quantise(static_cast<const double*>(weights.const_data_ptr()), n, scale);
  Tensor result = torch::stable::new_empty(weights, {n, 4}, ScalarType::Int);
  auto* table = static_cast<AliasEntry*>(result.mutable_data_ptr());
  fill(mass.get(), n, table);

  const double log_total = std::log(static_cast<double>(n) * static_cast<double>(kFull));
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      table[i].log_q_self = static_cast<float>(std::log(static_cast<double>(mass[i])) - log_total);
    }
  });
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) table[i].log_q_alias = table[table[i].alias].log_q_self;
  });
  return result;
}

}  // namespace
}  // namespace nce

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CPU, m) { m.impl("alias_table", TORCH_BOX(&nce::alias_table)); }
