// Entry point of the epilogue of shared negatives: threads, and the refusal of what a kernel has found.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "../shared_loss_call.h"
#include "kernels.h"

namespace nce {
namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // of logits: a thread gets at least a few microseconds of work

void run(const SharedLossCall& call, const OnCpu&) {
  const SharedLoss& p = call.p;
  const auto kernel = kernels().shared_loss[static_cast<int>(call.storage)];
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (p.n_columns + 2 * p.dim));
  std::atomic<int64_t> bad_pair{-1};
  torch::stable::parallel_for(0, p.batch, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(padded_dim(p.dim) * 2 + padded_dim(p.n_targets));
    const int64_t bad = kernel(p, begin, end, scratch.get());
    if (bad >= 0) bad_pair = bad;
  });
  if (bad_pair >= 0) {
    const int64_t id = p.target[bad_pair], example = bad_pair / p.n_targets;
    STD_TORCH_CHECK(id >= 0 && id < p.n_classes, "target must be in 0 .. ", p.n_classes - 1, ", got ", id,
                    " for example ", example);
    STD_TORCH_CHECK(false, "target must be classes with a finite log q, got class ", id, " for example ", example);
  }
}

constexpr auto kSharedLoss = &Operator<&shared_loss_<OnCpu, run>>::call;

}  // namespace
}  // namespace nce

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CPU, m) { m.impl("shared_loss_", TORCH_BOX(nce::kSharedLoss)); }
