// A call of sampled_loss on any device: its arguments checked, its outputs allocated, its parameters filled in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "loss_operands.h"

namespace nce {

struct SampledLossCall {
  SampledLoss p;
  Storage storage;  // of the weight
  Tensor loss, ids, dlogit, grad_hidden;
};

// Distance between examples of a tensor that holds one row per example or one for all; its rows are contiguous.
inline int64_t shared_stride(const char* name, const Tensor& t, int64_t batch, int64_t n) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(0) == batch || t.size(0) == 1) && t.size(1) == n, name, " must have shape [",
                  batch, " or 1, ", n, "], got ", shape_of(t));
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  return t.size(0) == 1 ? 0 : n;
}

inline SampledLossCall prepare_sampled_loss(const Tensor& hidden, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const Tensor& target,
                                            const std::optional<Tensor>& log_z, const std::optional<Tensor>& seed,
                                            const Tensor& table, const std::optional<Tensor>& negatives,
                                            const std::optional<Tensor>& target_log_q,
                                            const std::optional<Tensor>& negative_log_q, int64_t kind,
                                            int64_t num_negatives, bool subtract_log_q, double offset, bool remove_hits,
                                            bool uniform_labels, bool mean_candidates, int64_t ignore_index,
                                            const Objective& objective, bool needs_hidden_grad, bool needs_row_grad) {
  SampledLoss p{};
  const Storage storage = fill_operands(p, hidden, weight, bias, target, target_log_q, log_z, offset, uniform_labels,
                                        mean_candidates, ignore_index, objective);
  const ScalarType compute = compute_type(storage);
  STD_TORCH_CHECK(num_negatives >= 0, "num_negatives must be >= 0, got ", num_negatives);
  p.n_negatives = num_negatives;
  const int64_t columns = p.n_targets + p.n_negatives;
  STD_TORCH_CHECK(columns < (int64_t{1} << 31) && p.batch < (int64_t{1} << 32) &&
                      static_cast<double>(p.batch) * static_cast<double>(columns) < 0x1p32,
                  "hidden must have fewer than 2^32 / (k + T) rows, got ", p.batch);
  p.noise = noise_of(kind, p.n_classes, table, hidden);
  STD_TORCH_CHECK(seed || negatives, "seed must be given where negatives are not");
  if (seed) {
    p.seed = seed_words(*seed, hidden);
    p.seed_stride = seed->stride(0);
  }
  if (negatives) {
    check_tensor("negatives", *negatives, ScalarType::Long, hidden);
    p.negatives_stride = shared_stride("negatives", *negatives, p.batch, num_negatives);
    p.negatives = static_cast<const int64_t*>(negatives->const_data_ptr());
  }
  STD_TORCH_CHECK(!negative_log_q || negatives, "negative_log_q must come with negatives");
  if (negative_log_q) {
    check_tensor("negative_log_q", *negative_log_q, compute, hidden);
    p.negative_log_q_stride = shared_stride("negative_log_q", *negative_log_q, p.batch, num_negatives);
    p.negative_log_q = negative_log_q->const_data_ptr();
  }
  p.subtract_log_q = subtract_log_q;
  STD_TORCH_CHECK(objective.correct_positive || subtract_log_q, "subtract_log_q must be True without correct_positive");
  p.remove_hits = remove_hits;

  // An objective over the whole example keeps its scores until it knows the derivatives.
  const bool saves = needs_row_grad || (objective.kind != ObjectiveKind::kBinary && needs_hidden_grad);
  const int64_t saved = saves ? p.batch : 0;
  SampledLossCall call{
      p,
      storage,
      torch::stable::new_empty(hidden, {p.batch}, compute),
      torch::stable::new_empty(hidden, {saved, columns}, ScalarType::Int),
      torch::stable::new_empty(hidden, {saved, columns}, compute),
      torch::stable::new_empty(hidden, {needs_hidden_grad ? p.batch : 0, p.dim}, compute),
  };
  call.p.loss = call.loss.mutable_data_ptr();
  if (saves) {
    call.p.ids = static_cast<int32_t*>(call.ids.mutable_data_ptr());
    call.p.dlogit = call.dlogit.mutable_data_ptr();
  }
  if (needs_hidden_grad) call.p.grad_hidden = call.grad_hidden.mutable_data_ptr();
  return call;
}

}  // namespace nce
