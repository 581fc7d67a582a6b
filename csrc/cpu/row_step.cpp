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

void run_row_step(const RowStepCall& call) {
  const RowStep& p = call.step;
  if (call.classes) check_classes(call.classes, call.n, p.n_rows);
  const auto kernel = kernels().row_step[static_cast<int>(call.storage)];
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, p.dim));
  torch::stable::parallel_for(0, call.n, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * padded_dim(p.dim));
    kernel(p, call.classes, call.gradient, call.gradient_stride, begin, end, scratch.get());
  });
}

std::tuple<Tensor, Tensor> run_row_grad_step(const RowGradStepCall& call) {
  const RowStep& p = call.step;
  const ScalarType dtype = call.weight.scalar_type();
  Segments s = sort_segments(call.pairs, p.n_rows, dtype);
  Tensor classes = torch::stable::new_empty(call.pairs.ids, {s.size()}, ScalarType::Long);
  Tensor bias = torch::stable::new_empty(call.pairs.hidden, {call.with_bias ? s.size() : 0}, dtype);
  s.write_classes(static_cast<int64_t*>(classes.mutable_data_ptr()));
  if (call.with_bias) s.p.bias = bias.mutable_data_ptr();
  const auto kernel = kernels().row_grad_step[static_cast<int>(s.storage)];
  for_ranges(s, [&](int64_t begin, int64_t end) {
    const Scratch scratch(3 * padded_dim(p.dim));
    kernel(s.p, p, begin, end, scratch.get());
  });
  return {classes, bias};
}

// The squares of the rows are kept and added up in their order, so that the sum does not depend on threads.
Tensor row_grad_norm(const PairArguments& pairs, int64_t n_classes, bool with_rows, bool with_bias) {
  const Storage storage = storage_of("hidden", pairs.hidden);
  Segments s = sort_segments(pairs, n_classes, compute_type(storage));
  std::vector<double> squares(static_cast<size_t>(s.size()));
  const auto kernel = kernels().row_grad_norm[storage == Storage::kDouble];
  for_ranges(s, [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * padded_dim(s.p.dim));
    kernel(s.p, with_rows, with_bias, begin, end, scratch.get(), squares.data());
  });
  Tensor total = torch::stable::new_empty(pairs.hidden, {1}, ScalarType::Double);
  *static_cast<double*>(total.mutable_data_ptr()) = std::accumulate(squares.begin(), squares.end(), 0.0);
  return total;
}

}  // namespace
}  // namespace nce

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CPU, m) {
  m.impl("row_step_", TORCH_BOX(&nce::Operator<&nce::row_step_<nce::run_row_step>>::call));
  m.impl("row_grad_step_", TORCH_BOX(&nce::Operator<&nce::row_grad_step_<nce::run_row_grad_step>>::call));
  m.impl("row_grad_norm", TORCH_BOX(&nce::Operator<&nce::row_grad_norm>::call));
}
