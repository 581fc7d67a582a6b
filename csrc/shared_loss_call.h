// shared_loss_ on any device: its arguments checked, its outputs allocated, its parameters filled in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "loss_operands.h"
#include "shared_loss.h"

namespace nce {

// The negatives, as columns [U] of the scores; accidental_hits int32 [B, T, 2].
struct ColumnArguments {
  Tensor column_shift;
  std::optional<Tensor> multiplicity, accidental_hits;
  int64_t n_draws;
  using Fields = TypeList<Tensor, std::optional<Tensor>, std::optional<Tensor>, int64_t>;
};

// What is subtracted from a target's score: log q [B, T], and a constant.
struct TargetCorrectionArguments {
  std::optional<Tensor> target_log_q;
  double offset;
  using Fields = TypeList<std::optional<Tensor>, double>;
};

struct SharedLossCall {
  SharedLoss p;
  Storage storage;  // of the weight
  Tensor loss, target_ids, target_dlogit, grad_hidden, grad_shift;
};

inline SharedLossCall prepare_shared_loss(const Tensor& logits, const OperandArguments& operands,
                                          const ColumnArguments& columns, const TargetCorrectionArguments& correction,
                                          const LabelArguments& labels, const ObjectiveArguments& objective,
                                          const std::optional<Tensor>& example_weight, bool needs_derivatives,
                                          bool needs_hidden_grad) {
  const Tensor& hidden = operands.hidden;
  SharedLoss p{};
  const Storage storage = fill_operands(p, operands, correction.target_log_q, correction.offset, labels, objective);
  const ScalarType compute = compute_type(storage);
  check_tensor("logits", logits, compute, hidden);
  check_rows("logits", logits);
  p.n_columns = logits.size(1);
  STD_TORCH_CHECK(logits.size(0) == p.batch, "logits must have ", p.batch, " rows, got ", logits.size(0));
  STD_TORCH_CHECK(p.batch <= 1 || logits.stride(0) >= p.n_columns, "logits must have rows that do not overlap");
  STD_TORCH_CHECK(p.n_columns < (int64_t{1} << 31) && p.n_targets < (int64_t{1} << 31),
                  "logits and target must have fewer than 2^31 columns, got ", p.n_columns, " and ", p.n_targets);
  p.column_shift = contiguous_data("column_shift", columns.column_shift, compute, {p.n_columns}, hidden);
  p.multiplicity = contiguous_data("multiplicity", columns.multiplicity, compute, {p.n_columns}, hidden);
  p.accidental_hits = static_cast<const int32_t*>(
      contiguous_data("accidental_hits", columns.accidental_hits, ScalarType::Int, {p.batch, p.n_targets, 2}, hidden));
  p.example_weight = contiguous_data("example_weight", example_weight, compute, {p.batch}, hidden);
  STD_TORCH_CHECK(columns.n_draws >= 0, "n_draws must be >= 0, got ", columns.n_draws);
  p.n_draws = columns.n_draws;
  STD_TORCH_CHECK(p.objective.correct_positive || correction.target_log_q,
                  "target_log_q must be given without correct_positive");
  p.needs_derivatives = needs_derivatives;

  const int64_t examples = needs_derivatives ? p.batch : 0;
  SharedLossCall call{
      p,
      storage,
      torch::stable::new_empty(logits, {p.batch}, compute),
      torch::stable::new_empty(logits, {examples, p.n_targets}, ScalarType::Int),
      torch::stable::new_empty(logits, {examples, p.n_targets}, compute),
      torch::stable::new_empty(logits, {needs_derivatives && needs_hidden_grad ? p.batch : 0, p.dim}, compute),
      torch::stable::new_empty(logits, {examples}, compute),
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

// The operator. Device{tensor} makes a tensor's device the current one, on which Run(call, device) fills the outputs.
template <class Device, auto Run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shared_loss_(
    const Tensor& logits, const OperandArguments& operands, const ColumnArguments& columns,
    const TargetCorrectionArguments& correction, const LabelArguments& labels, const ObjectiveArguments& objective,
    const std::optional<Tensor>& example_weight, bool needs_derivatives, bool needs_hidden_grad) {
  const Device device(logits);
  const SharedLossCall call = prepare_shared_loss(logits, operands, columns, correction, labels, objective,
                                                  example_weight, needs_derivatives, needs_hidden_grad);
  Run(call, device);
  return {call.loss, call.target_ids, call.target_dlogit, call.grad_hidden, call.grad_shift};
}

}  // namespace nce
