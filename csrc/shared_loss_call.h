// A call of shared_loss_ on any device: its arguments checked, its outputs allocated, its parameters filled in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "loss_operands.h"
#include "shared_loss.h"

namespace nce {

struct SharedLossCall {
  SharedLoss p;
  Storage storage;  // of the weight
  Tensor loss, target_ids, target_dlogit, grad_hidden, grad_shift;
};

inline SharedLossCall prepare_shared_loss(const Tensor& logits, const Tensor& hidden, const Tensor& weight,
                                          const std::optional<Tensor>& bias, const Tensor& target,
                                          const std::optional<Tensor>& target_log_q, const std::optional<Tensor>& log_z,
                                          const Tensor& column_shift, const std::optional<Tensor>& multiplicity,
                                          const std::optional<Tensor>& hits, const std::optional<Tensor>& row_scale,
                                          double offset, bool uniform_labels, bool mean_candidates, int64_t n_draws,
                                          int64_t ignore_index, const Objective& objective, bool needs_derivatives,
                                          bool needs_hidden_grad) {
  SharedLoss p{};
  const Storage storage = fill_operands(p, hidden, weight, bias, target, target_log_q, log_z, offset, uniform_labels,
                                        mean_candidates, ignore_index, objective);
  const ScalarType compute = compute_type(storage);
  check_tensor("logits", logits, compute, hidden);
  check_rows("logits", logits);
  p.n_columns = logits.size(1);
  STD_TORCH_CHECK(logits.size(0) == p.batch, "logits must have ", p.batch, " rows, got ", logits.size(0));
  STD_TORCH_CHECK(p.batch <= 1 || logits.stride(0) >= p.n_columns, "logits must have rows that do not overlap");
  STD_TORCH_CHECK(p.n_columns < (int64_t{1} << 31) && p.n_targets < (int64_t{1} << 31),
                  "logits and target must have fewer than 2^31 columns, got ", p.n_columns, " and ", p.n_targets);
  p.column_shift = contiguous_data("column_shift", column_shift, compute, {p.n_columns}, hidden);
  p.multiplicity = contiguous_data("multiplicity", multiplicity, compute, {p.n_columns}, hidden);
  p.hits =
      static_cast<const int32_t*>(contiguous_data("hits", hits, ScalarType::Int, {p.batch, p.n_targets, 2}, hidden));
  p.row_scale = contiguous_data("row_scale", row_scale, compute, {p.batch}, hidden);
  STD_TORCH_CHECK(n_draws >= 0, "n_draws must be >= 0, got ", n_draws);
  p.n_draws = n_draws;
  STD_TORCH_CHECK(objective.correct_positive || target_log_q, "target_log_q must be given without correct_positive");
  p.needs_derivatives = needs_derivatives;

  const int64_t rows = needs_derivatives ? p.batch : 0;
  SharedLossCall call{
      p,
      storage,
      torch::stable::new_empty(logits, {p.batch}, compute),
      torch::stable::new_empty(logits, {rows, p.n_targets}, ScalarType::Int),
      torch::stable::new_empty(logits, {rows, p.n_targets}, compute),
      torch::stable::new_empty(logits, {needs_derivatives && needs_hidden_grad ? p.batch : 0, p.dim}, compute),
      torch::stable::new_empty(logits, {rows}, compute),
  };
  call.p.logits = logits.mutable_data_ptr();
  call.p.logits_stride = p.batch > 1 ? logits.stride(0) : p.n_columns;
  call.p.loss = call.loss.mutable_data_ptr();
  if (needs_derivatives) {
    call.p.target_ids = static_cast<int32_t*>(call.target_ids.mutable_data_ptr());
    call.p.target_dlogit = call.target_dlogit.mutable_data_ptr();
    call.p.grad_shift = call.grad_shift.mutable_data_ptr();
    if (needs_hidden_grad) call.p.grad_hidden = call.grad_hidden.mutable_data_ptr();
  }
  return call;
}

}  // namespace nce
