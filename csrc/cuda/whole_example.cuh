// What an objective over the whole example sums up while the rows go by; see ../example_objective.h.
#pragma once

#include "../example_objective.h"
#include "candidates.cuh"
#include "reduce.cuh"

namespace nce::cuda {

// `negatives.max` and `n_live` are the same in all lanes; of all else a lane has the part of its own columns. kShare
// neighbouring lanes have the same column.
template <class Real, int kShare>
struct WholeSums {
  ExponentSum<Real> targets, negatives;
  Real target_value;  // kSoftmax: sum of z; kAdversarial: of losses
  Real negative_value;
  int n_live;  // columns

  __device__ __forceinline__ void clear() {
    targets = negatives = ExponentSum<Real>{-infinity_of<Real>(), Real(0)};
    target_value = negative_value = Real(0);
    n_live = 0;
  }

  static __device__ __forceinline__ Real exponent_of(const Objective& objective, Real z) {
    return objective.kind == ObjectiveKind::kAdversarial ? bounded(static_cast<Real>(objective.temperature) * z) : z;
  }

  // Makes room for the lanes' columns, where there is none: true if what was summed so far is to be multiplied by
  // `factor`.
  __device__ __forceinline__ bool make_room(const Objective& objective, Real z, bool negative, Real& factor) {
    const Real exponent = negative ? exponent_of(objective, z) : -infinity_of<Real>();
    if (!__any_sync(kAllLanes, exponent > negatives.max)) return false;
    factor = raise_max(negatives, warp_max<kShare>(exponent));
    if (objective.kind == ObjectiveKind::kAdversarial) negative_value *= factor;
    return true;
  }

  // Takes in a column of which either `target` or `negative` holds, or none of them. Returns what its row is to be
  // weighted by in the gradient, so far.
  __device__ __forceinline__ Real take(const Objective& objective, Real z, bool target, bool negative, Real label) {
    const Real e = negative ? exp_negative(negatives.max - exponent_of(objective, z)) : Real(0);
    negatives.weight += e;
    if (objective.kind == ObjectiveKind::kAdversarial) {
      const Column<Real> column = binary_column(z, label);
      if (target) target_value += column.loss;
      if (negative) negative_value += e * column.loss;
      return e * column.dlogit;
    }
    if (target) {
      add(targets, z);
      target_value += z;
    }
    if (negative) negative_value += z;
    return e;
  }

  // Of all lanes.
  __device__ __forceinline__ ExampleSums<Real> total(const Objective& objective, int n_targets) const {
    ExampleSums<Real> sums = no_columns<Real>();
    sums.negatives = ExponentSum<Real>{negatives.max, warp_sum<kShare>(negatives.weight)};
    sums.negative_value = warp_sum<kShare>(negative_value);
    sums.n_negatives = static_cast<Real>(n_live - n_targets);
    const Real value = warp_sum<kShare>(target_value);
    if (objective.kind == ObjectiveKind::kAdversarial) {
      sums.target_loss = static_cast<Real>(objective.positive_weight) * value;
    } else {
      sums.target_score = value;
      sums.targets.max = warp_max<kShare>(targets.max);
      sums.targets.weight = warp_sum<kShare>(targets.weight * exp_negative(sums.targets.max - targets.max));
    }
    return sums;
  }
};

// The derivative of a column's z; 0 where z is -inf, which stands for no column. With the label of a target.
template <class Real>
__device__ __forceinline__ Real column_dlogit(const Objective& objective, const Normaliser<Real>& n, Real z,
                                              bool target, Real label) {
  if (z == -infinity_of<Real>()) return Real(0);
  if (!target) return negative_dlogit(objective, n, z);
  if (objective.kind == ObjectiveKind::kSoftmax) return softmax_target_dlogit(n, z);
  return static_cast<Real>(objective.positive_weight) * binary_column(z, label).dlogit;
}

// log(1 - q) of an example's only target, for kSoftmax without correct_positive.
template <class Real>
__device__ __forceinline__ Real log_not_target(const SampledLoss& p, int64_t example) {
  if (p.objective.correct_positive) return Real(0);
  Real log_q_target = Real(0);
  if (p.target_log_q) {
    log_q_target = static_cast<const Real*>(p.target_log_q)[example];
  } else if (p.subtract_log_q) {
    log_q_target = static_cast<Real>(log_q(p.noise, p.target[example]));
  }
  return log_rest(log_q_target);
}

}  // namespace nce::cuda
