// Entry point of the epilogue of shared negatives: checks, outputs, the kernel of the weight's storage type. It waits
// for nothing.
#include "shared_loss.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../shared_loss_call.h"
#include "launch.cuh"

namespace nce::cuda {
namespace {

template <class Stored>
void launch_shared_loss(const SharedLoss& p, const OnDevice& device) {
  constexpr size_t kGrain = 4096;  // in which shared memory is asked for, so that few sizes occur
  const int n_warps = shared_loss_warps(p);
  const size_t grains = (shared_loss_bytes<Compute<Stored>>(p) + kGrain - 1) / kGrain;
  static Occupancy occupancy[kSharedWarps + 1][12];
  launch_persistent(shared_loss_kernel<Stored>, p.batch, n_warps * kWarp, grains * kGrain, device,
                    occupancy[n_warps][grains], p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shared_loss_(
    Tensor logits, Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor target,
    std::optional<Tensor> target_log_q, std::optional<Tensor> log_z, Tensor column_shift,
    std::optional<Tensor> multiplicity, std::optional<Tensor> hits, std::optional<Tensor> row_scale, double offset,
    bool uniform_labels, bool mean_candidates, int64_t n_draws, int64_t ignore_index, int64_t objective,
    double positive_weight, double label_smoothing, double temperature, bool correct_positive, bool needs_derivatives,
    bool needs_hidden_grad) {
  const OnDevice device(logits);
  const SharedLossCall call =
      prepare_shared_loss(logits, hidden, weight, bias, target, target_log_q, log_z, column_shift, multiplicity, hits,
                          row_scale, offset, uniform_labels, mean_candidates, n_draws, ignore_index,
                          objective_of(objective, positive_weight, label_smoothing, temperature, correct_positive),
                          needs_derivatives, needs_hidden_grad);
  with_stored(call.storage, [&](auto stored) { launch_shared_loss<decltype(stored)>(call.p, device); });
  return {call.loss, call.target_ids, call.target_dlogit, call.grad_hidden, call.grad_shift};
}

}  // namespace
}  // namespace nce::cuda

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CUDA, m) { m.impl("shared_loss_", TORCH_BOX(&nce::cuda::shared_loss_)); }
