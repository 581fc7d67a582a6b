// Parameters of the fused forward pass: filled once after checking, read by every backend's kernel.
#pragma once

#include <cstdint>

#include "noise.h"
#include "objective_options.h"
#include "philox.h"

namespace nce {

enum class Storage : int32_t { kFloat = 0, kBFloat16 = 1, kHalf = 2, kDouble = 3 };

NCE_HD int bytes_of(Storage storage) { return storage == Storage::kDouble ? 8 : storage == Storage::kFloat ? 4 : 2; }

// What every loss of rows of a table takes. Pointers to "compute" values are to float, or to double if the weight is
// stored as double.
struct LossOperands {
  int64_t batch, dim, n_targets, n_classes;

  const void* hidden;  // [batch, dim]
  int64_t hidden_stride;
  Storage hidden_storage;
  const void* weight;  // [n_classes, dim]
  int64_t weight_stride;
  const void* bias;          // [n_classes] of the weight's storage, or null
  const int64_t* target;     // [batch, n_targets], ignore_index where there is none
  const void* target_log_q;  // compute, [batch, n_targets], or null
  const void* log_z;         // compute, [batch], or null
  int64_t log_z_stride;

  double offset;  // subtracted from every score: log k of the correction plus a constant log z
  bool uniform_labels, mean_candidates;
  int64_t ignore_index;
  Objective objective;
};

struct SampledLoss : LossOperands {
  int64_t n_negatives;
  Noise noise;
  const int64_t* seed;  // [2], where the kernel runs; null if negatives are given
  int64_t seed_stride;
  const int64_t* negatives;    // given ids [batch or 1, n_negatives], or null: draw
  int64_t negatives_stride;    // 0 when all examples share them
  const void* negative_log_q;  // compute, as negatives, or null: the noise's, as for a null target_log_q
  int64_t negative_log_q_stride;
  bool subtract_log_q, remove_hits;

  void* loss;         // compute, [batch]
  int32_t* ids;       // [batch, n_targets + n_negatives], or null; -1 where a target is absent
  void* dlogit;       // compute, same shape, or null
  void* grad_hidden;  // compute, [batch, dim], or null
};

}  // namespace nce
