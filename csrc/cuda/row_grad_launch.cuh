// Picks and launches the kernels of the row gradient for its storage type and hidden's.
#pragma once

#include "../row_grad_call.h"
#include "launch.cuh"
#include "row_grad_join.cuh"

namespace nce::cuda {

// Sorted pairs, and the memory that their sums need.
struct RowGradWork {
  RowGradCall call;
  RowGradTiles p{};
  Tensor classes, pairs, counts, partial_rows, partial_bias;
};

inline Tensor scratch(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

RowGradWork sort_row_grad(const PairArguments& pairs, int64_t n_classes, ScalarType dtype, bool with_rows,
                          bool by_class, const OnDevice& device);

// p.segment_class[s] = class of segment s, of which there are at most n_rows.
void list_segments(const RowGradTiles& p, int64_t n_rows, const OnDevice& device);

// Sums the segments of sorted pairs into p.rows and p.bias.
void sum_segments(const RowGradTiles& p, const RowGradCall& call, const OnDevice& device);

// Rows behind the last segment get class 0 and value 0.
void clear_spare_rows(const RowGradTiles& p, Storage storage, int64_t n_rows, const OnDevice& device);

}  // namespace nce::cuda
