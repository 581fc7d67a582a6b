// Picks and launches the kernels of the row gradient for its storage type and hidden's.
#pragma once

#include "../row_grad_call.h"
#include "launch.cuh"
#include "row_grad_join.cuh"

namespace nce::cuda {

// Sums the segments of sorted pairs into p.rows and p.bias.
void sum_segments(const RowGradTiles& p, const RowGradCall& call, const OnDevice& device);

// Rows behind the last segment get class 0 and value 0.
void clear_spare_rows(const RowGradTiles& p, Storage storage, int64_t n_rows, const OnDevice& device);

}  // namespace nce::cuda
