// Entry points of the optimizers' steps on rows: from a gradient in memory, or as it is summed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "../row_step_call.h"
#include "segments.h"

namespace nce {
namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // a thread gets at least a few microseconds of work

// Distinct, so that no two threads step on one row.
void check_classes(const int64_t* classes, int64_t n, int64_t n_rows) {
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(classes[i] >= (i ? classes[i - 1] + 1 : 0) && classes[i] < n_rows,
                    "classes must ascend, each once, within 0 .. ", n_rows - 1, ", got ", classes[i], " at ", i);
  }
}

void row_step_(Tensor weight, std::optional<Tensor> classes, Tensor gradient, std::optional<Tensor> first,
               std::optional<Tensor> second, std::optional<Tensor> row_steps, std::optional<Tensor> decayed,
               std::optional<Tensor> master, std::optional<Tensor> gradient_scale, std::optional<Tensor> seed,
               int64_t rule, int64_t step, double rate, double weight_decay, double log_decay, double momentum,
               double dampening, double beta1, double beta2, double eps, bool nesterov, bool maximize) {
  const RowStep p = prepare_row_step(
      weight, {first, second, row_steps, decayed, master}, gradient_scale, seed,
      {rule_of(rule), nesterov, maximize, step, rate, weight_decay, log_decay, momentum, dampening, beta1, beta2, eps});
  check_gradient(gradient, classes, weight);
  const int64_t n = gradient.size(0);
  const auto* rows = classes ? static_cast<const int64_t*>(classes->const_data_ptr()) : nullptr;
  if (rows) check_classes(rows, n, p.n_rows);
  const auto kernel = kernels().row_step[static_cast<int>(storage_of("weight", weight))];
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, p.dim));
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * padded_dim(p.dim));
    kernel(p, rows, gradient.const_data_ptr(), gradient.stride(0), begin, end, scratch.get());
  });
}

std::tuple<Tensor, Tensor> row_grad_step_(Tensor ids, Tensor dlogit, Tensor grad_loss, Tensor hidden, Tensor weight,
                                          std::optional<Tensor> first, std::optional<Tensor> second,
                                          std::optional<Tensor> row_steps, std::optional<Tensor> decayed,
                                          std::optional<Tensor> master, std::optional<Tensor> gradient_scale,
                                          std::optional<Tensor> seed, bool with_bias, int64_t rule, int64_t step,
                                          double rate, double weight_decay, double log_decay, double momentum,
                                          double dampening, double beta1, double beta2, double eps, bool nesterov,
                                          bool maximize) {
  const RowStep p = prepare_row_step(
      weight, {first, second, row_steps, decayed, master}, gradient_scale, seed,
      {rule_of(rule), nesterov, maximize, step, rate, weight_decay, log_decay, momentum, dampening, beta1, beta2, eps});
  check_device("weight", weight, hidden);
  STD_TORCH_CHECK(hidden.size(1) == p.dim, "hidden must have ", p.dim, " columns, got ", hidden.size(1));
  Segments s = sort_segments(ids, dlogit, grad_loss, hidden, p.n_rows, weight.scalar_type());
  Tensor classes = torch::stable::new_empty(ids, {s.size()}, ScalarType::Long);
  Tensor bias = torch::stable::new_empty(hidden, {with_bias ? s.size() : 0}, weight.scalar_type());
  s.write_classes(static_cast<int64_t*>(classes.mutable_data_ptr()));
  if (with_bias) s.p.bias = bias.mutable_data_ptr();
  const auto kernel = kernels().row_grad_step[static_cast<int>(s.storage)];
  for_ranges(s, [&](int64_t begin, int64_t end) {
    const Scratch scratch(3 * padded_dim(p.dim));
    kernel(s.p, p, begin, end, scratch.get());
  });
  return {classes, bias};
}

// The squares of the rows are kept and added up in their order, so that the sum does not depend on threads.
Tensor row_grad_norm(Tensor ids, Tensor dlogit, Tensor grad_loss, Tensor hidden, int64_t n_classes, bool with_rows,
                     bool with_bias) {
  const Storage storage = storage_of("hidden", hidden);
  Segments s = sort_segments(ids, dlogit, grad_loss, hidden, n_classes, compute_type(storage));
  std::vector<double> squares(static_cast<size_t>(s.size()));
  const auto kernel = kernels().row_grad_norm[storage == Storage::kDouble];
  for_ranges(s, [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * padded_dim(s.p.dim));
    kernel(s.p, with_rows, with_bias, begin, end, scratch.get(), squares.data());
  });
  Tensor total = torch::stable::new_empty(hidden, {1}, ScalarType::Double);
  *static_cast<double*>(total.mutable_data_ptr()) = std::accumulate(squares.begin(), squares.end(), 0.0);
  return total;
}

}  // namespace
}  // namespace nce

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CPU, m) {
  m.impl("row_step_", TORCH_BOX(&nce::row_step_));
  m.impl("row_grad_step_", TORCH_BOX(&nce::row_grad_step_));
  m.impl("row_grad_norm", TORCH_BOX(&nce::row_grad_norm));
}
