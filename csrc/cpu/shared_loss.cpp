// Entry point of the epilogue of shared negatives: checks, outputs, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "../shared_loss_call.h"
#include "kernels.h"

namespace nce {
namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // of logits: a thread gets at least a few microseconds of work

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shared_loss_(
    Tensor logits, Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor target,
    std::optional<Tensor> target_log_q, std::optional<Tensor> log_z, Tensor column_shift,
    std::optional<Tensor> multiplicity, std::optional<Tensor> hits, std::optional<Tensor> row_scale, double offset,
    bool uniform_labels, bool mean_candidates, int64_t n_draws, int64_t ignore_index, int64_t objective,
    double positive_weight, double label_smoothing, double temperature, bool correct_positive, bool needs_derivatives,
    bool needs_hidden_grad) {
  const SharedLossCall call =
      prepare_shared_loss(logits, hidden, weight, bias, target, target_log_q, log_z, column_shift, multiplicity, hits,
                          row_scale, offset, uniform_labels, mean_candidates, n_draws, ignore_index,
                          objective_of(objective, positive_weight, label_smoothing, temperature, correct_positive),
                          needs_derivatives, needs_hidden_grad);
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
  return {call.loss, call.target_ids, call.target_dlogit, call.grad_hidden, call.grad_shift};
}

}  // namespace
}  // namespace nce

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CPU, m) { m.impl("shared_loss_", TORCH_BOX(&nce::shared_loss_)); }
