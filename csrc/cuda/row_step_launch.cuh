// Settles rows before a step; see row_step.cuh.
#pragma once

#include "../row_step_call.h"
#include "launch.cuh"
#include "row_step.cuh"

namespace nce::cuda {

struct Settled {
  Tensor memory;  // SettledRow
  bool each;      // whether there is one for each row, not one for all
};

Settled settle_rows(const RowStep& p, Storage storage, const int64_t* classes, int64_t n, const Tensor& like,
                    const OnDevice& device);

}  // namespace nce::cuda
