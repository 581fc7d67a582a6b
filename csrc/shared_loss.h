// Parameters of the epilogue between the matrix products of shared negatives: scores in, loss and derivatives out.
#pragma once

#include "sampled_loss.h"

namespace nce {

// Pointers to "compute" values are to float, or to double if the weight is stored as double.
struct SharedLoss {
  int64_t batch, dim, n_targets, n_columns, n_classes;

  // The targets' rows are read here: the matrix products are of the negatives alone.
  const void* hidden;  // [batch, dim]
  int64_t hidden_stride;
  Storage hidden_storage;
  const void* weight;  // [n_classes, dim]
  int64_t weight_stride;
  const void* bias;          // [n_classes] of the weight's storage, or null
  const int64_t* target;     // [batch, n_targets], ignore_index where there is none
  const void* target_log_q;  // compute, [batch, n_targets], or null: no correction
  const void* log_z;         // compute, [batch], or null
  int64_t log_z_stride;
  double offset;  // subtracted from the targets' scores; column_shift has it for the negatives

  const void* column_shift;  // compute, [n_columns], added to a column's scores: bias - log q - offset
  const void* multiplicity;  // compute, [n_columns], how often a column counts, or null: once
  const int32_t* hits;    // [batch, n_targets, 2], columns from .. to - 1 are the target's class; or null: none masked
  const void* row_scale;  // compute, [batch], or null; multiplies all derivatives, and not the loss
  int64_t n_draws;        // for mean_candidates
  bool uniform_labels, mean_candidates;
  int64_t ignore_index;
  Objective objective;

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
