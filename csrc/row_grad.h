// Parameters of the segmented sum that turns (id, dlogit) pairs into one gradient row per touched class.
#pragma once

#include <cstdint>

#include "sampled_loss.h"

namespace nce {

// pair / columns without a division: for 1 < columns < 2^32 and pair < 2^32 the upper half of
// pair * (floor((2^64 - 1) / columns) + 1) is exact.
struct ExampleOf {
  uint64_t columns, reciprocal;
};

NCE_HD ExampleOf examples_of(uint64_t columns) {
  return ExampleOf{columns, columns > 1 ? ~uint64_t{0} / columns + 1 : 0};
}

NCE_HD int64_t example_of(const ExampleOf& examples, uint64_t pair) {
  if (examples.columns == 1) return static_cast<int64_t>(pair);
#if defined(__CUDA_ARCH__)
  return static_cast<int64_t>(__umul64hi(pair, examples.reciprocal));
#else
  return static_cast<int64_t>((static_cast<unsigned __int128>(pair) * examples.reciprocal) >> 64);
#endif
}

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
