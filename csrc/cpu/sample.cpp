// Entry points: noise ids, and the name of the instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <string>

#include "../check.h"
#include "kernels.h"

namespace nce {
namespace {

constexpr int64_t kGrain = 4096;  // draws, about 20 microseconds

Tensor sample(Tensor seed, Tensor table, int64_t kind, int64_t n_classes, int64_t rows, int64_t cols) {
  const Seed words = read_seed(seed_words(seed, seed), seed.stride(0));
  const Noise noise = noise_of(kind, n_classes, table, seed);
  check_sample_shape(rows, cols);
  Tensor ids = torch::stable::new_empty(seed, {rows, cols});
  auto* out = static_cast<int64_t*>(ids.mutable_data_ptr());
  std::atomic<bool> in_range{true};
  torch::stable::parallel_for(0, ids.numel(), kGrain, [&](int64_t begin, int64_t end) {
    if (!kernels().sample(noise, words, cols, begin, end, out)) in_range = false;
  });
  STD_TORCH_CHECK(in_range, "table must be an alias table of ", n_classes, " classes, got an alias out of range");
  return ids;
}

std::string simd_level() { return kernels().level; }

}  // namespace
}  // namespace nce

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CPU, m) { m.impl("sample", TORCH_BOX(&nce::sample)); }
STABLE_TORCH_LIBRARY_IMPL(nce_ext, CompositeExplicitAutograd, m) { m.impl("simd_level", TORCH_BOX(&nce::simd_level)); }
