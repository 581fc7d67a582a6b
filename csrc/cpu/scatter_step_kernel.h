// Adds the gradient of each pair to its row of the table as it comes, without locks (Recht et al., "Hogwild!",
// NeurIPS 2011): what two threads add to one element at the same time may be lost in part.
#pragma once

#include "../scatter_step.h"
#include "rows.h"
#include "simd.h"

namespace nce::NCE_SIMD_NAMESPACE {

NCE_INLINE void add_scaled(float* row, const float* x, float scale, int64_t dim) {
  const Vec<float> c(scale);
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(row + d, fma(c, load(x + d), load(row + d)));
  if (d < dim) {
    const int64_t n = dim - d;
    store_first(row + d, fma(c, load_first(x + d, n), load_first(row + d, n)), n);
  }
}

static void scatter_step(const ScatterStep& p, int64_t begin, int64_t end, void* scratch) {
  constexpr int64_t kAhead = 8;  // pairs; their rows lie anywhere in the table
  float* x = static_cast<float*>(scratch);
  const int64_t n_pairs = end * p.columns;
  for (int64_t example = begin; example < end; ++example) {
    widen_hidden(p.hidden, example * p.hidden_stride, p.hidden_storage, p.dim, x);
    const float scale = -p.rate * p.grad_loss[example * p.grad_loss_stride];
    for (int64_t pair = example * p.columns; pair < (example + 1) * p.columns; ++pair) {
      if (pair + kAhead < n_pairs && p.ids[pair + kAhead] >= 0) {
        prefetch_row(p.weight + p.ids[pair + kAhead] * p.weight_stride, p.dim, false);
      }
      const int64_t id = p.ids[pair];
      if (id < 0) continue;
      const float coefficient = scale * p.dlogit[pair];
      add_scaled(p.weight + id * p.weight_stride, x, coefficient, p.dim);
      if (p.bias) p.bias[id] += coefficient;
    }
  }
}

}  // namespace nce::NCE_SIMD_NAMESPACE
