// Entry points of the row gradient: sort (class, pair), then sum each class's segment. No atomics, fixed order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "huge_pages.h"
#include "segments.h"

namespace nce {
namespace {

void sum_segments(const Segments& s) {
  const auto kernel = kernels().row_grad[static_cast<int>(s.storage)];
  for_ranges(s, [&](int64_t begin, int64_t end) {
    const Scratch scratch(padded_dim(s.p.dim));
    kernel(s.p, begin, end, scratch.get());
  });
}

std::tuple<Tensor, Tensor, Tensor> row_grad(const PairArguments& pairs, const RowGradArguments& gradient, bool padded) {
  const auto& [n_classes, dtype, with_rows, with_bias] = gradient;
  Segments s = sort_segments(pairs, n_classes, dtype);
  const int64_t n_rows = padded ? s.n_padded : s.size();
  const auto allocate = [&](const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
    return padded ? torch::stable::new_zeros(like, sizes, type) : torch::stable::new_empty(like, sizes, type);
  };
  Tensor classes = allocate(pairs.ids, {n_rows}, ScalarType::Long);
  Tensor rows = allocate(pairs.hidden, {with_rows ? n_rows : 0, s.p.dim}, dtype);
  Tensor bias = allocate(pairs.hidden, {with_bias ? n_rows : 0}, dtype);
  s.write_classes(static_cast<int64_t*>(classes.mutable_data_ptr()));
  if (with_rows) {
    s.p.values = rows.mutable_data_ptr();
    prefer_huge_pages(s.p.values, rows.numel() * rows.element_size());
  }
  if (with_bias) s.p.bias = bias.mutable_data_ptr();
  sum_segments(s);
  return {classes, rows, bias};
}

std::tuple<Tensor, Tensor> row_grad_dense(const PairArguments& pairs, const RowGradArguments& gradient) {
  const auto& [n_classes, dtype, with_rows, with_bias] = gradient;
  Segments s = sort_segments(pairs, n_classes, dtype);
  Tensor rows = torch::stable::new_zeros(pairs.hidden, {with_rows ? n_classes : 0, s.p.dim}, dtype);
  Tensor bias = torch::stable::new_zeros(pairs.hidden, {with_bias ? n_classes : 0}, dtype);
  s.p.by_class = true;
  if (with_rows) s.p.values = rows.mutable_data_ptr();
  if (with_bias) s.p.bias = bias.mutable_data_ptr();
  sum_segments(s);
  return {rows, bias};
}

}  // namespace
}  // namespace nce

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CPU, m) {
  m.impl("row_grad", TORCH_BOX(&nce::Operator<&nce::row_grad>::call));
  m.impl("row_grad_dense", TORCH_BOX(&nce::Operator<&nce::row_grad_dense>::call));
}
