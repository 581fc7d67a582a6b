// A call of row_grad or row_grad_dense on any device, its arguments checked.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "check.h"
#include "operator.h"
#include "row_grad.h"

namespace nce {

// The pairs that a gradient of rows is the sum of: ids int32 [B, C] (-1: none), dlogit [B, C], grad_loss [B], hidden
// [B, D].
struct PairArguments {
  Tensor ids, dlogit, grad_loss, hidden;
  using Fields = TypeList<Tensor, Tensor, Tensor, Tensor>;
};

// The gradient to make of them, of a table of n_classes rows.
struct RowGradArguments {
  int64_t n_classes;
  ScalarType dtype;
  bool with_rows, with_bias;
  using Fields = TypeList<int64_t, ScalarType, bool, bool>;
};

struct RowGradCall {
  int64_t batch, columns, n_pairs, n_classes, dim;
  Storage storage, hidden_storage;  // of the gradient, of hidden
};

inline RowGradCall check_row_grad(const PairArguments& pairs, int64_t n_classes, ScalarType dtype) {
  const auto& [ids, dlogit, grad_loss, hidden] = pairs;
  check_tensor("ids", ids, ScalarType::Int, hidden);
  STD_TORCH_CHECK(ids.dim() == 2 && ids.is_contiguous(), "ids must be 2-D and contiguous, got ", shape_of(ids));
  STD_TORCH_CHECK(n_classes >= 1 && n_classes < (int64_t{1} << 31), "n_classes must be in 1 .. 2^31 - 1, got ",
                  n_classes);
  const int64_t batch = ids.size(0), columns = ids.size(1), n_pairs = batch * columns;
  const Storage hidden_storage = storage_of("hidden", hidden);
  const ScalarType compute = compute_type(hidden_storage);
  check_tensor("dlogit", dlogit, compute, hidden);
  check_shape("dlogit", dlogit, {batch, columns});
  STD_TORCH_CHECK(dlogit.is_contiguous(), "dlogit must be contiguous");
  check_tensor("grad_loss", grad_loss, compute, hidden);
  check_shape("grad_loss", grad_loss, {batch});
  check_rows("hidden", hidden);
  STD_TORCH_CHECK(hidden.size(0) == batch, "hidden must have ", batch, " rows, got ", hidden.size(0));
  STD_TORCH_CHECK(n_pairs < (int64_t{1} << 32), "ids must have fewer than 2^32 elements, got ", n_pairs);
  const Storage storage = storage_of_type("dtype", dtype);
  STD_TORCH_CHECK((storage == Storage::kDouble) == (hidden_storage == Storage::kDouble),
                  "dtype and hidden must both be float64 or neither");
  return RowGradCall{batch, columns, n_pairs, n_classes, hidden.size(1), storage, hidden_storage};
}

// Rows of a COO gradient whose size may not depend on the ids: as many as there can be.
inline int64_t padded_rows(const RowGradCall& call) { return std::min(call.n_pairs, call.n_classes); }

}  // namespace nce
