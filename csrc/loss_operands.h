// Arguments that all losses have in common, in groups: their part of a schema, checked and filled in.
#pragma once

#include <optional>

#include "check.h"
#include "operator.h"
#include "sampled_loss.h"

namespace nce {

// hidden [B, D], weight [V, D], bias [V], target int64 [B, T], log_z [B].
struct OperandArguments {
  Tensor hidden, weight;
  std::optional<Tensor> bias;
  Tensor target;
  std::optional<Tensor> log_z;
  using Fields = TypeList<Tensor, Tensor, std::optional<Tensor>, Tensor, std::optional<Tensor>>;
};

// How many labels a target gets, what the loss of an example is divided by, and which target is none.
struct LabelArguments {
  bool uniform_labels, mean_candidates;
  int64_t ignore_index;
  using Fields = TypeList<bool, bool, int64_t>;
};

// Data of a contiguous tensor of that type and shape, or null if there is none.
inline const void* contiguous_data(const char* name, const std::optional<Tensor>& t, ScalarType type,
                                   std::initializer_list<int64_t> shape, const Tensor& like) {
  if (!t) return nullptr;
  check_tensor(name, *t, type, like);
  check_shape(name, *t, shape);
  STD_TORCH_CHECK(t->is_contiguous(), name, " must be contiguous");
  return t->const_data_ptr();
}

// Weight and bias are read only, and with hidden on CUDA may both be in pinned host memory. Returns the storage type of
// the weight.
inline Storage fill_operands(LossOperands& p, const OperandArguments& operands,
                             const std::optional<Tensor>& target_log_q, double offset, const LabelArguments& labels,
                             const ObjectiveArguments& objective) {
  const auto& [hidden, weight, bias, target, log_z] = operands;
  p.weight = readable_data("weight", weight, hidden);
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
  p.weight_stride = weight.stride(0);
  contiguous_data("bias", bias, weight.scalar_type(), {p.n_classes}, weight);
  p.bias = bias ? readable_data("bias", *bias, hidden) : nullptr;

  check_tensor("target", target, ScalarType::Long, hidden);
  STD_TORCH_CHECK(target.dim() == 2 && target.size(0) == p.batch && target.is_contiguous(),
                  "target must be contiguous of shape [", p.batch, ", T], got ", shape_of(target));
  p.target = static_cast<const int64_t*>(target.const_data_ptr());
  p.n_targets = target.size(1);
  p.target_log_q = contiguous_data("target_log_q", target_log_q, compute, {p.batch, p.n_targets}, hidden);
  if (log_z) {
    check_tensor("log_z", *log_z, compute, hidden);
    check_shape("log_z", *log_z, {p.batch});
    p.log_z = log_z->const_data_ptr();
    p.log_z_stride = log_z->stride(0);
  }
  p.offset = offset;
  p.uniform_labels = labels.uniform_labels;
  p.mean_candidates = labels.mean_candidates;
  p.ignore_index = labels.ignore_index;
  const std::string refusal = refusal_of(objective);
  STD_TORCH_CHECK(refusal.empty(), refusal);
  p.objective = objective_of(objective);
  STD_TORCH_CHECK(p.objective.kind == ObjectiveKind::kBinary || !p.mean_candidates,
                  "mean_candidates must be False but for the binary objective");
  STD_TORCH_CHECK(p.objective.correct_positive || p.n_targets == 1,
                  "target must have one column without correct_positive, got ", p.n_targets);
  return storage;
}

}  // namespace nce
