// Entry point of the fused forward pass: checks, outputs, the kernel of the weight's storage type. It waits for
// nothing.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../sampled_loss_call.h"
#include "sampled_loss_launch.cuh"

namespace nce::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sampled_loss(
    Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor target, std::optional<Tensor> log_z,
    std::optional<Tensor> seed, Tensor table, std::optional<Tensor> negatives, std::optional<Tensor> target_log_q,
    std::optional<Tensor> negative_log_q, int64_t kind, int64_t num_negatives, bool subtract_log_q, double offset,
    bool remove_hits, bool uniform_labels, bool mean_candidates, int64_t ignore_index, int64_t objective,
    double positive_weight, double label_smoothing, double temperature, bool correct_positive, bool needs_hidden_grad,
    bool needs_row_grad, int64_t /*gradient layout: for the backward pass*/) {
  const OnDevice device(hidden);
  const SampledLossCall call = prepare_sampled_loss(
      hidden, weight, bias, target, log_z, seed, table, negatives, target_log_q, negative_log_q, kind, num_negatives,
      subtract_log_q, offset, remove_hits, uniform_labels, mean_candidates, ignore_index,
      objective_of(objective, positive_weight, label_smoothing, temperature, correct_positive), needs_hidden_grad,
      needs_row_grad);
  const bool whole = call.p.objective.kind != ObjectiveKind::kBinary;
  switch (call.storage) {
    case Storage::kFloat:
      whole ? whole_example_float(call.p, device) : sampled_loss_float(call.p, device);
      break;
    case Storage::kBFloat16:
      whole ? whole_example_bfloat16(call.p, device) : sampled_loss_bfloat16(call.p, device);
      break;
    case Storage::kHalf:
      whole ? whole_example_half(call.p, device) : sampled_loss_half(call.p, device);
      break;
    case Storage::kDouble:
      whole ? whole_example_double(call.p, device) : sampled_loss_double(call.p, device);
      break;
  }
  return {call.loss, call.ids, call.dlogit, call.grad_hidden};
}

}  // namespace
}  // namespace nce::cuda

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CUDA, m) { m.impl("sampled_loss", TORCH_BOX(&nce::cuda::sampled_loss)); }
