// Entry point of the racy in-place step: sample, gather, loss, and weight[id] -= learning_rate * dlogit * hidden, all
// in one pass (Recht et al., "Hogwild!", NeurIPS 2011). Warps read rows that others are changing, and add to them by
// atomics in no order: the result differs from run to run, by design.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../sampled_loss_call.h"
#include "sampled_loss_launch.cuh"

namespace nce::cuda {
namespace {

std::tuple<Tensor, Tensor> scatter_sgd_(Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor target,
                                        std::optional<Tensor> log_z, std::optional<Tensor> seed, Tensor table,
                                        std::optional<Tensor> negatives, std::optional<Tensor> target_log_q,
                                        std::optional<Tensor> negative_log_q, int64_t kind, int64_t num_negatives,
                                        bool subtract_log_q, double offset, bool remove_hits, bool uniform_labels,
                                        bool mean_candidates, int64_t ignore_index, bool needs_hidden_grad,
                                        double learning_rate) {
  const OnDevice device(hidden);
  const SampledLossCall call = prepare_sampled_loss(
      {hidden, weight, bias, target, log_z}, {seed, table, kind, num_negatives, negatives, remove_hits},
      {target_log_q, negative_log_q, subtract_log_q, offset}, {uniform_labels, mean_candidates, ignore_index},
      {0, 1, 0, 0, true}, needs_hidden_grad, /*needs_row_grad=*/false);
  check_device("weight", weight, hidden);  // it is written, by atomics that hold on the device alone
  // Each addition to a bfloat16 row would round away most of a small step.
  STD_TORCH_CHECK(call.storage == Storage::kFloat, "weight must be float32 to be updated in place");
  const InPlaceUpdate update{static_cast<float*>(weight.mutable_data_ptr()),
                             bias ? static_cast<float*>(bias->mutable_data_ptr()) : nullptr,
                             static_cast<float>(learning_rate)};
  sampled_loss_of<float, Purpose::kUpdate>(call.p, update, device);
  return {call.loss, call.grad_hidden};
}

}  // namespace
}  // namespace nce::cuda

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CUDA, m) { m.impl("scatter_sgd_", TORCH_BOX(&nce::cuda::scatter_sgd_)); }
