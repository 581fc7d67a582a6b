// sampled_loss on any device: its arguments checked, its outputs allocated, its parameters filled in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "loss_operands.h"

namespace nce {

// Where an example's negatives come from: drawn by seed [2] from the noise, or given, int64 [B or 1, k].
struct CandidateArguments {
  std::optional<Tensor> seed;
  Tensor table;
  int64_t kind, num_negatives;
  std::optional<Tensor> negatives;
  bool remove_hits;
  using Fields = TypeList<std::optional<Tensor>, Tensor, int64_t, int64_t, std::optional<Tensor>, bool>;
};

// What is subtracted from a score: log q of the targets [B, T] and of the negatives [B or 1, k], and a constant.
struct CorrectionArguments {
  std::optional<Tensor> target_log_q, negative_log_q;
  bool subtract_log_q;
  double offset;
  using Fields = TypeList<std::optional<Tensor>, std::optional<Tensor>, bool, double>;
};

struct SampledLossCall {
  SampledLoss p;
  Storage storage;  // of the weight
  Tensor loss, ids, dlogit, grad_hidden;
};

// Distance between examples of a tensor that holds one entry per example or one for all; its entries are contiguous.
inline int64_t shared_stride(const char* name, const Tensor& t, int64_t batch, int64_t n) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(0) == batch || t.size(0) == 1) && t.size(1) == n, name, " must have shape [",
                  batch, " or 1, ", n, "], got ", shape_of(t));
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  return t.size(0) == 1 ? 0 : n;
}

inline void fill_candidates(SampledLoss& p, const CandidateArguments& candidates, const Tensor& hidden) {
  const auto& [seed, table, kind, num_negatives, negatives, remove_hits] = candidates;
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
  p.remove_hits = remove_hits;
}

inline void fill_correction(SampledLoss& p, const CorrectionArguments& correction, ScalarType compute,
                            const Tensor& hidden) {
  const std::optional<Tensor>& negative_log_q = correction.negative_log_q;
  STD_TORCH_CHECK(!negative_log_q || p.negatives, "negative_log_q must come with negatives");
  if (negative_log_q) {
    check_tensor("negative_log_q", *negative_log_q, compute, hidden);
    p.negative_log_q_stride = shared_stride("negative_log_q", *negative_log_q, p.batch, p.n_negatives);
    p.negative_log_q = negative_log_q->const_data_ptr();
  }
  p.subtract_log_q = correction.subtract_log_q;
  STD_TORCH_CHECK(p.objective.correct_positive || p.subtract_log_q,
                  "subtract_log_q must be True without correct_positive");
}

inline SampledLossCall prepare_sampled_loss(const OperandArguments& operands, const CandidateArguments& candidates,
                                            const CorrectionArguments& correction, const LabelArguments& labels,
                                            const ObjectiveArguments& objective, bool needs_hidden_grad,
                                            bool needs_row_grad) {
  const Tensor& hidden = operands.hidden;
  SampledLoss p{};
  const Storage storage = fill_operands(p, operands, correction.target_log_q, correction.offset, labels, objective);
  const ScalarType compute = compute_type(storage);
  fill_candidates(p, candidates, hidden);
  fill_correction(p, correction, compute, hidden);

  // An objective over the whole example keeps its scores until it knows the derivatives.
  const bool saves = needs_row_grad || (p.objective.kind != ObjectiveKind::kBinary && needs_hidden_grad);
  const int64_t saved = saves ? p.batch : 0, columns = p.n_targets + p.n_negatives;
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

// The operator. Device{tensor} makes a tensor's device the current one, on which Run(call, device) fills the outputs.
template <class Device, auto Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> sampled_loss(
    const OperandArguments& operands, const CandidateArguments& candidates, const CorrectionArguments& correction,
    const LabelArguments& labels, const ObjectiveArguments& objective, bool needs_hidden_grad, bool needs_row_grad,
    int64_t /*gradient_layout: for the backward pass*/) {
  const Device device(operands.hidden);
  const SampledLossCall call =
      prepare_sampled_loss(operands, candidates, correction, labels, objective, needs_hidden_grad, needs_row_grad);
  Run(call, device);
  return {call.loss, call.ids, call.dlogit, call.grad_hidden};
}

}  // namespace nce
