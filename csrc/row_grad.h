// Parameters of the segmented sum that turns (id, dlogit) pairs into one gradient row per touched class.
#pragma once

#include <cstdint>

#include "sampled_loss.h"

namespace nce {

// Pairs are sorted by class: pair p = example * columns + column has coefficient dlogit[p] * grad_loss[example].
struct RowGrad {
  int64_t dim, columns;
  const uint64_t* pairs;         // class << 32 | pair, sorted
  const int64_t* segment_start;  // [n_segments + 1] into pairs
  const void* dlogit;            // compute
  const void* grad_loss;         // compute, [batch]
  int64_t grad_loss_stride;
  const void* hidden;
  int64_t hidden_stride;
  Storage hidden_storage;

  void* values;   // gradient rows of `dim`, of the weight's storage, or null
  void* bias;     // gradient elements, or null
  bool by_class;  // write row s of the output at its class (dense) instead of at s (COO)
};

}  // namespace nce
