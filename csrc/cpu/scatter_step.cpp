// Entry point of the racy scatter: checks, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../scatter_step_call.h"
#include "kernels.h"

namespace nce {
namespace {

constexpr int64_t kGrainElements = 64 * 1024;  // a thread gets at least a few microseconds of work

void run_scatter_step(const ScatterStep& p, const Tensor&) {
  const int64_t n_pairs = p.batch * p.columns;
  STD_TORCH_CHECK(n_pairs == 0 || *std::max_element(p.ids, p.ids + n_pairs) < p.n_classes, "ids must be below ",
                  p.n_classes);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, p.columns * p.dim));
  torch::stable::parallel_for(0, p.batch, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(padded_dim(p.dim));
    kernels().scatter_step(p, begin, end, scratch.get());
  });
}

}  // namespace
}  // namespace nce

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CPU, m) {
  m.impl("scatter_step_", TORCH_BOX(&nce::Operator<&nce::scatter_step_<nce::run_scatter_step>>::call));
}
