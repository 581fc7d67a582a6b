// The operators row_step_ and row_grad_step_: their arguments, which are checked here, as a device's code takes them.
// Each device registers an instance of the two entries, for a function of its own that does the work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "check.h"
#include "row_grad_call.h"
#include "row_step.h"

namespace nce {

// The state of a table; csrc/row_step.h says what each is.
struct StateArguments {
  std::optional<Tensor> first, second, row_steps, decayed, master;
  using Fields = TypeList<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
                          std::optional<Tensor>>;
};

struct HyperparameterArguments {
  int64_t rule, step;
  double rate, weight_decay, log_decay, momentum, dampening, beta1, beta2, eps;
  bool nesterov, maximize;
  using Fields = TypeList<int64_t, int64_t, double, double, double, double, double, double, double, double, bool, bool>;
};

inline void* state_of(const char* name, const std::optional<Tensor>& t, bool wanted, ScalarType type,
                      std::initializer_list<int64_t> shape, const Tensor& weight) {
  STD_TORCH_CHECK(wanted || !t, name, " must be None with this rule");
  if (!t) return nullptr;
  check_tensor(name, *t, type, weight);
  check_shape(name, *t, shape);
  STD_TORCH_CHECK(t->is_contiguous(), name, " must be contiguous");
  return t->mutable_data_ptr();
}

inline Hyperparameters hyperparameters_of(const HyperparameterArguments& a) {
  STD_TORCH_CHECK(a.rule >= 0 && a.rule <= 3, "rule must be 0, 1, 2 or 3, got ", a.rule);
  return {static_cast<StepRule>(a.rule),
          a.step,
          a.rate,
          a.weight_decay,
          a.log_decay,
          a.momentum,
          a.dampening,
          a.beta1,
          a.beta2,
          a.eps,
          a.nesterov,
          a.maximize};
}

inline RowStep prepare_row_step(const Tensor& weight, const StateArguments& state,
                                const std::optional<Tensor>& gradient_scale, const std::optional<Tensor>& seed,
                                const Hyperparameters& hyperparameters) {
  check_rows("weight", weight);
  const Storage storage = storage_of("weight", weight);
  const ScalarType compute = compute_type(storage);
  const int64_t n_rows = weight.size(0), dim = weight.size(1);
  STD_TORCH_CHECK(n_rows <= 1 || weight.stride(0) >= dim, "weight must have rows that do not overlap");
  RowStep p{};
  static_cast<Hyperparameters&>(p) = hyperparameters;
  p.dim = dim;
  p.n_rows = n_rows;
  p.weight = weight.mutable_data_ptr();
  p.weight_stride = weight.stride(0);
  const bool adam = p.rule == StepRule::kAdam, sgd = p.rule == StepRule::kSgd;
  STD_TORCH_CHECK(!adam || (state.first && state.second), "first and second must be given with rule 3");
  STD_TORCH_CHECK(adam || sgd || state.second, "second must be given with rule ", static_cast<int>(p.rule));
  STD_TORCH_CHECK(!adam || state.row_steps || p.step >= 1, "step must be >= 1, got ", p.step);
  p.first = state_of("first", state.first, adam || sgd, compute, {n_rows, dim}, weight);
  if (p.rule == StepRule::kRowwiseAdagrad) {
    p.second = state_of("second", state.second, true, compute, {n_rows}, weight);
  } else {
    p.second = state_of("second", state.second, !sgd, compute, {n_rows, dim}, weight);
  }
  p.row_steps = static_cast<int32_t*>(state_of("row_steps", state.row_steps, true, ScalarType::Int, {n_rows}, weight));
  p.decayed = static_cast<double*>(state_of("decayed", state.decayed, true, ScalarType::Double, {n_rows}, weight));
  const bool narrow = storage == Storage::kBFloat16 || storage == Storage::kHalf;
  STD_TORCH_CHECK(narrow || !state.master, "master must be None but for a 16-bit weight");
  p.master = static_cast<float*>(state_of("master", state.master, true, ScalarType::Float, {n_rows, dim}, weight));
  if (gradient_scale) {
    check_tensor("gradient_scale", *gradient_scale, compute, weight);
    STD_TORCH_CHECK(gradient_scale->numel() == 1, "gradient_scale must have one element, got shape ",
                    shape_of(*gradient_scale));
    p.gradient_scale = gradient_scale->const_data_ptr();
  }
  if (seed) {
    STD_TORCH_CHECK(narrow, "seed must be None but for a 16-bit weight");
    p.seed = seed_words(*seed, weight);
    p.seed_stride = seed->stride(0);
  }
  return p;
}

struct RowStepCall {
  RowStep step;
  Storage storage;         // of weight and gradient
  int64_t n;               // rows to step on
  const int64_t* classes;  // [n]; null: rows 0 .. n - 1
  const void* gradient;    // [n, dim]
  int64_t gradient_stride;
  const Tensor& weight;  // where kernels run and allocate
};

inline RowStepCall prepare_row_step_call(const RowStep& step, const Tensor& weight,
                                         const std::optional<Tensor>& classes, const Tensor& gradient) {
  check_tensor("gradient", gradient, weight.scalar_type(), weight);
  check_rows("gradient", gradient);
  int64_t rows = weight.size(0);
  if (classes) {
    check_tensor("classes", *classes, ScalarType::Long, weight);
    STD_TORCH_CHECK(classes->dim() == 1 && classes->is_contiguous(), "classes must be 1-D and contiguous, got ",
                    shape_of(*classes));
    rows = classes->size(0);
  }
  check_shape("gradient", gradient, {rows, weight.size(1)});
  return {step,
          storage_of("weight", weight),
          rows,
          classes ? static_cast<const int64_t*>(classes->const_data_ptr()) : nullptr,
          gradient.const_data_ptr(),
          gradient.stride(0),
          weight};
}

// Pairs are not checked yet: the functions that sort them do.
struct RowGradStepCall {
  RowStep step;
  const PairArguments& pairs;
  const Tensor& weight;
  bool with_bias;
};

// Run: void (const RowStepCall&).
template <auto Run>
void row_step_(const Tensor& weight, const std::optional<Tensor>& classes, const Tensor& gradient,
               const StateArguments& state, const std::optional<Tensor>& gradient_scale,
               const std::optional<Tensor>& seed, const HyperparameterArguments& hyperparameters) {
  const RowStep p = prepare_row_step(weight, state, gradient_scale, seed, hyperparameters_of(hyperparameters));
  Run(prepare_row_step_call(p, weight, classes, gradient));
}

// Run: std::tuple<Tensor, Tensor> (const RowGradStepCall&).
template <auto Run>
std::tuple<Tensor, Tensor> row_grad_step_(const PairArguments& pairs, const Tensor& weight, const StateArguments& state,
                                          const std::optional<Tensor>& gradient_scale,
                                          const std::optional<Tensor>& seed, bool with_bias,
                                          const HyperparameterArguments& hyperparameters) {
  const RowStep p = prepare_row_step(weight, state, gradient_scale, seed, hyperparameters_of(hyperparameters));
  const Tensor& hidden = pairs.hidden;
  check_device("weight", weight, hidden);
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden must have ", p.dim, " columns, got shape ", shape_of(hidden));
  STD_TORCH_CHECK(hidden.size(1) == p.dim, "hidden must have ", p.dim, " columns, got ", hidden.size(1));
  return Run(RowGradStepCall{p, pairs, weight, with_bias});
}

}  // namespace nce
