// Objectives that look at all candidates of an example at once: softmax, and negatives weighted by their own scores.
//
// Over the negatives j, of which each counts c_j times, stands one sum of exponents a_j, in one pass and in any order:
// kSoftmax has a_j = z_j, kAdversarial a_j = temperature * z_j. Once it is complete, a Normaliser says how a column
// enters loss and gradient.
#pragma once

#include "objective.h"
#include "objective_options.h"

namespace nce {

constexpr double kSmallestRest = 0x1p-24;  // what 1 - q is taken to be at least

NCE_HD float natural_log(float x) { return logf(x); }
NCE_HD double natural_log(double x) { return log(x); }
NCE_HD float expm1_of(float x) { return expm1f(x); }
NCE_HD double expm1_of(double x) { return expm1(x); }
template <class Real>
NCE_HD Real larger_of(Real a, Real b) {
  return a > b ? a : b;
}
// The exponent of a negative; one that overflowed stays finite, so that it is no different from its own maximum.
NCE_HD float bounded(float a) { return a > FLT_MAX ? FLT_MAX : a; }
NCE_HD double bounded(double a) { return a > DBL_MAX ? DBL_MAX : a; }
template <class Real>
NCE_HD Real infinity_of() {
  return static_cast<Real>(INFINITY);
}

// log(1 + e^d); -inf gives 0.
template <class Real>
NCE_HD Real softplus(Real d) {
  return max_zero(d) + log1p_unit(exp_negative(magnitude(d)));
}

template <class Real>
NCE_HD Real sigmoid(Real d) {
  const Real e = exp_negative(magnitude(d)), larger = reciprocal(Real(1) + e);
  return select_nonnegative(d, larger, e * larger);
}

// log(1 - q), of a target whose log q is given.
template <class Real>
NCE_HD Real log_rest(Real log_q) {
  return natural_log(larger_of(-expm1_of(log_q), static_cast<Real>(kSmallestRest)));
}

// A sum over columns: weight = sum of c e^(a - max).
template <class Real>
struct ExponentSum {
  Real max;
  Real weight;
};

// Makes room for exponents up to `max`: what is summed so far is to be multiplied by the result.
template <class Real>
NCE_HD Real raise_max(ExponentSum<Real>& sum, Real max) {
  if (!(max > sum.max)) return Real(1);
  const Real factor = exp_negative(max - sum.max);  // 0 for an empty sum
  sum.max = max;
  sum.weight *= factor;
  return factor;
}

template <class Real>
NCE_HD void add(ExponentSum<Real>& sum, Real exponent) {
  raise_max(sum, exponent);
  sum.weight += exp_negative(sum.max - exponent);
}

template <class Real>
NCE_HD Real log_of(const ExponentSum<Real>& sum) {
  return sum.weight == Real(0) ? -infinity_of<Real>() : sum.max + natural_log(sum.weight);  // NaN stays NaN
}

// Everything that must be summed over an example's columns before loss and gradient are known.
template <class Real>
struct ExampleSums {
  ExponentSum<Real> targets, negatives;
  Real target_score;    // sum of z over the targets
  Real negative_value;  // kSoftmax: sum of c z; kAdversarial: of c e^(a - max) softplus(z)
  Real n_negatives;     // sum of c
  Real target_loss;     // kAdversarial
};

template <class Real>
NCE_HD ExampleSums<Real> no_columns() {
  const ExponentSum<Real> empty{-infinity_of<Real>(), Real(0)};
  return ExampleSums<Real>{empty, empty, Real(0), Real(0), Real(0), Real(0)};
}

template <class Real>
struct Normaliser {
  Real loss;
  Real label;           // kSoftmax: of a target, after smoothing
  Real log_targets;     // kSoftmax: log of the sum of e^z over the targets
  Real total_label;     // kSoftmax: sum of the labels
  Real negative_share;  // kSoftmax: probability that falls on the negatives
  Real max, scale;      // of the negatives: derivative c (scale e^(a - max) u - smooth), u = 1 or sigmoid(z)
  Real smooth;
};

// With `log_not_target` = log(1 - q of the target), for kSoftmax without correct_positive.
template <class Real>
NCE_HD Normaliser<Real> normalise(const Objective& objective, const ExampleSums<Real>& sums, int64_t n_targets,
                                  bool uniform_labels, Real log_not_target) {
  Normaliser<Real> n{};
  n.max = sums.negatives.max;
  const Real inverse = sums.negatives.weight == Real(0) ? Real(0) : Real(1) / sums.negatives.weight;
  if (objective.kind == ObjectiveKind::kAdversarial) {
    n.loss = sums.target_loss + sums.negative_value * inverse;
    n.scale = inverse;
    return n;
  }
  // A negative's logit is z + shift.
  Real shift = Real(0);
  if (!objective.correct_positive && sums.n_negatives > Real(0)) shift = log_not_target - natural_log(sums.n_negatives);
  const Real count = static_cast<Real>(n_targets), label = uniform_labels ? Real(1) / count : Real(1);
  const Real eps = static_cast<Real>(objective.label_smoothing);
  n.total_label = label * count;
  n.smooth = eps * n.total_label / (count + sums.n_negatives);
  n.label = (Real(1) - eps) * label + n.smooth;
  n.log_targets = log_of(sums.targets);
  // Negatives against targets: from this difference come both the loss and the probabilities, to their last digits
  // however well the example is classified.
  const Real difference = log_of(sums.negatives) + shift - n.log_targets;
  n.negative_share = sigmoid(difference);
  n.scale = n.total_label * n.negative_share * inverse;
  n.loss = n.total_label * softplus(difference) + (n.total_label * n.log_targets - n.label * sums.target_score);
  if (n.smooth > Real(0)) n.loss -= n.smooth * (sums.negative_value + shift * sums.n_negatives);
  return n;
}

// Derivative of the loss in a target's z, for kSoftmax.
template <class Real>
NCE_HD Real softmax_target_dlogit(const Normaliser<Real>& n, Real z) {
  const Real among_targets = n.total_label * exp_negative(n.log_targets - z);  // z is at most their log-sum-exp
  return (among_targets - n.label) - n.negative_share * among_targets;
}

// Derivative in a negative's z, for a column that counts once.
template <class Real>
NCE_HD Real negative_dlogit(const Objective& objective, const Normaliser<Real>& n, Real z) {
  if (objective.kind == ObjectiveKind::kAdversarial) {
    return n.scale * exp_negative(n.max - bounded(static_cast<Real>(objective.temperature) * z)) * sigmoid(z);
  }
  return n.scale * exp_negative(n.max - z) - n.smooth;
}

}  // namespace nce
