// Entry point of the alias table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "../check.h"
#include "alias_build.h"
#include "huge_pages.h"

namespace nce {
namespace {

constexpr int64_t kGrain = 1 << 16;

Tensor alias_table(Tensor weights, double scale) {
  check_dtype("weights", weights, ScalarType::Double);
  STD_TORCH_CHECK(weights.dim() == 1 && weights.is_contiguous(), "weights must be 1-D and contiguous");
  const int64_t n = weights.size(0);
  STD_TORCH_CHECK(n >= 1 && n < (int64_t{1} << 31), "weights must have 1 .. 2^31 - 1 entries, got ", n);

  const auto mass = quantise_masses(static_cast<const double*>(weights.const_data_ptr()), n, scale);
  Tensor result = torch::stable::new_empty(weights, {n, 4}, ScalarType::Int);
  auto* table = static_cast<AliasEntry*>(result.mutable_data_ptr());
  prefer_huge_pages(table, n * static_cast<int64_t>(sizeof(AliasEntry)));
  fill_buckets(mass.get(), n, table);

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
