// Entry point of the fused forward pass: threads, and the refusal of what a kernel has found.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "../sampled_loss_call.h"
#include "kernels.h"

namespace nce {
namespace {

constexpr int64_t kGrainBytes = 32 * 1024;  // of candidate rows: a thread gets at least a few microseconds of work

// The kernel has found a pair with an unusable id; nothing that it wrote has left this file.
void refuse_pair(const SampledLoss& p, int64_t pair) {
  const int64_t columns = p.n_targets + p.n_negatives, example = pair / columns, column = pair % columns;
  const bool positive = column < p.n_targets;
  STD_TORCH_CHECK(positive || p.negatives != nullptr, "table must be an alias table of ", p.n_classes,
                  " classes, got an alias out of range for example ", example);
  const int64_t id = positive ? p.target[example * p.n_targets + column]
                              : p.negatives[example * p.negatives_stride + column - p.n_targets];
  const char* name = positive ? "target" : "negatives";
  STD_TORCH_CHECK(id >= 0 && id < p.n_classes, name, " must be in 0 .. ", p.n_classes - 1, ", got ", id,
                  " for example ", example);
  STD_TORCH_CHECK(false, name, " must be classes with a finite log q, got class ", id, " for example ", example);
}

void run(const SampledLossCall& call, const OnCpu&) {
  const SampledLoss& p = call.p;
  const auto kernel = kernels().sampled_loss[static_cast<int>(call.storage)];
  const int64_t columns = p.n_targets + p.n_negatives, row_bytes = p.dim * (call.storage == Storage::kDouble ? 8 : 4);
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, columns * row_bytes));
  std::atomic<int64_t> bad_pair{-1};
  torch::stable::parallel_for(0, p.batch, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * padded_dim(p.dim));
    const int64_t bad = kernel(p, begin, end, scratch.get());
    if (bad >= 0) bad_pair = bad;
  });
  if (bad_pair >= 0) refuse_pair(p, bad_pair);
}

constexpr auto kSampledLoss = &Operator<&sampled_loss<OnCpu, run>>::call;

}  // namespace
}  // namespace nce

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CPU, m) { m.impl("sampled_loss", TORCH_BOX(nce::kSampledLoss)); }
