// Parameters of the epilogue between the matrix products of shared negatives: scores in, loss and derivatives out.
#pragma once

#include "sampled_loss.h"

namespace nce {

// The targets' rows are read here: the matrix products are of the negatives alone. A null target_log_q is no
// correction.
struct SharedLoss : LossOperands {
  int64_t n_columns;
  const void* column_shift;  // compute, [n_columns], added to a column's scores: bias - log q - offset
  const void* multiplicity;  // compute, [n_columns], how often a column counts, or null: once
  const int32_t*
      accidental_hits;  // [batch, n_targets, 2], columns from .. to - 1 are the target's class; or null: none masked
  const void* example_weight;  // compute, [batch], or null; multiplies all derivatives, and not the loss
  int64_t n_draws;             // for mean_candidates

  void* logits;  // compute, [batch, n_columns]; <hidden, row of the column> in, derivatives out
  int64_t logits_stride;
  void* loss;              // compute, [batch]
  int32_t* target_ids;     // [batch, n_targets], -1 where a target is absent
  void* target_dlogit;     // compute, [batch, n_targets]
  void* grad_hidden;       // compute, [batch, dim], or null: the targets' part; the matrix product adds the rest
  void* grad_shift;        // compute, [batch], or null: sum of an example's derivatives
  bool needs_derivatives;  // otherwise only the loss is written, and logits are left undefined
};

}  // namespace nce
