// A call of sampled_loss on any device: its arguments checked, its outputs allocated, its parameters filled in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "check.h"
#include "sampled_loss.h"

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
  check_device("weight", weight, hidden);
  const Storage storage = storage_of("weight", weight);
  const ScalarType compute = compute_type(storage);
  p.hidden_storage = storage_of("hidden", hidden);
  STD_TORCH_CHECK((p.hidden_storage == Storage::kDouble) == (storage == Storage::kDouble),
                  "hidden and weight must both be float64 or neither");
  check_rows("hidden", hidden);
  check_rows("weight", weight);
  p.batch = hidden.size(0);
  p.dim = weight.size(1);
  p.n_classes = weight.size(0);
  STD_TORCH_CHECK(hidden.size(1) == p.dim, "hidden must have ", p.dim, " columns, got ", hidden.size(1));
  p.hidden = hidden.const_data_ptr();
  p.hidden_stride = hidden.stride(0);
  p.weight = weight.const_data_ptr();
  p.weight_stride = weight.stride(0);
  if (bias) {
    check_tensor("bias", *bias, weight.scalar_type(), hidden);
    check_shape("bias", *bias, {p.n_classes});
    STD_TORCH_CHECK(bias->is_contiguous(), "bias must be contiguous");
    p.bias = bias->const_data_ptr();
  }

  check_tensor("target", target, ScalarType::Long, hidden);
  STD_TORCH_CHECK(target.dim() == 2 && target.size(0) == p.batch && target.is_contiguous(),
                  "target must be contiguous of shape [", p.batch, ", T], got ", shape_of(target));
  p.target = static_cast<const int64_t*>(target.const_data_ptr());
  p.n_targets = target.size(1);
  STD_TORCH_CHECK(num_negatives >= 0, "num_negatives must be >= 0, got ", num_negatives);
  p.n_negatives = num_negatives;
  const int64_t columns = p.n_targets + p.n_negatives;
  STD_TORCH_CHECK(columns < (int64_t{1} << 31) && p.batch < (int64_t{1} << 32) &&
                      static_cast<double>(p.batch) * static_cast<double>(columns) < 0x1p32,
                  "hidden must have fewer than 2^32 / (k + T) rows, got ", p.batch);
  if (log_z) {
    check_tensor("log_z", *log_z, compute, hidden);
    check_shape("log_z", *log_z, {p.batch});
    p.log_z = log_z->const_data_ptr();
    p.log_z_stride = log_z->stride(0);
  }

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
  if (target_log_q) {
    check_tensor("target_log_q", *target_log_q, compute, hidden);
    check_shape("target_log_q", *target_log_q, {p.batch, p.n_targets});
    STD_TORCH_CHECK(target_log_q->is_contiguous(), "target_log_q must be contiguous");
    p.target_log_q = target_log_q->const_data_ptr();
  }
  if (negative_log_q) {
    check_tensor("negative_log_q", *negative_log_q, compute, hidden);
    p.negative_log_q_stride = shared_stride("negative_log_q", *negative_log_q, p.batch, num_negatives);
    p.negative_log_q = negative_log_q->const_data_ptr();
  }
  p.subtract_log_q = subtract_log_q;
  p.offset = offset;
  p.remove_hits = remove_hits;
  p.uniform_labels = uniform_labels;
  p.mean_candidates = mean_candidates;
  p.ignore_index = ignore_index;
  p.objective = objective;
  const bool whole = objective.kind != ObjectiveKind::kBinary;
  STD_TORCH_CHECK(!(whole && mean_candidates), "mean_candidates must be False but for the binary objective");
  STD_TORCH_CHECK(objective.correct_positive || p.n_targets == 1,
                  "target must have one column without correct_positive, got ", p.n_targets);

  // An objective over the whole example keeps its scores until it knows the derivatives.
  const bool saves = needs_row_grad || (whole && needs_hidden_grad);
  const int64_t saved = saves ? p.batch : 0;
  SampledLossCall call{
      p,
      storage,
      torch::stable::new_empty(weight, {p.batch}, compute),
      torch::stable::new_empty(weight, {saved, columns}, ScalarType::Int),
      torch::stable::new_empty(weight, {saved, columns}, compute),
      torch::stable::new_empty(weight, {needs_hidden_grad ? p.batch : 0, p.dim}, compute),
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
