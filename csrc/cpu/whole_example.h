// Objectives over all candidates of an example, tile by tile: the gradient of hidden is summed with unscaled weights,
// in one pass, while p.dlogit keeps the scores; once the last tile is in, both are put right.
#pragma once

#include "rows.h"
#include "tiles.h"

namespace nce::NCE_SIMD_NAMESPACE {

template <class Real>
NCE_INLINE Real largest(const Vec<Real>& v) {
  alignas(64) Real lanes[kLanes];
  store(lanes, v);
  Real most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = larger_of(most, lanes[i]);
  return most;
}

// max - a, which only a lane that is no negative can have below 0. NaN stays NaN.
template <class Real>
NCE_INLINE Vec<Real> below_maximum(const Vec<Real>& difference) {
  return map([](auto p) NCE_INLINE_LAMBDA { return p < 0 ? decltype(p){} : p; }, difference);
}

// Scores z of 16 negatives to derivatives for columns that count once; 0 where z is -inf, which stands for no column.
template <class Real>
NCE_INLINE Vec<Real> negative_dlogits(const Objective& objective, const Normaliser<Real>& n, const Vec<Real>& z) {
  Vec<Real> dlogit;
  if (objective.kind == ObjectiveKind::kAdversarial) {
    const Vec<Real> exponent = clamp_finite(Vec<Real>(static_cast<Real>(objective.temperature)) * z);
    dlogit = Vec<Real>(n.scale) * exp_negative(Vec<Real>(n.max) - exponent) * negative_column(clamp_finite(z)).dlogit;
  } else {
    dlogit = Vec<Real>(n.scale) * exp_negative(Vec<Real>(n.max) - z) - Vec<Real>(n.smooth);
  }
  const Real lowest = sizeof(Real) == 4 ? static_cast<Real>(-FLT_MAX) : static_cast<Real>(-DBL_MAX);
  return map([](auto p, auto low, auto d) NCE_INLINE_LAMBDA { return p < low ? decltype(d){} : d; }, z,
             Vec<Real>(lowest), dlogit);
}

// Takes 16 negatives into the sums, those with live = 1; live = 0 leaves one out. Their maximum is in the sums already.
// Returns the weights that the gradient of hidden is summed with.
template <class Real>
NCE_INLINE Vec<Real> add_negatives(const Objective& objective, ExampleSums<Real>& sums, const Vec<Real>& z,
                                   const Vec<Real>& live) {
  if (objective.kind == ObjectiveKind::kAdversarial) {
    const Vec<Real> exponent = clamp_finite(Vec<Real>(static_cast<Real>(objective.temperature)) * z);
    const Vec<Real> e = live * exp_negative(below_maximum(Vec<Real>(sums.negatives.max) - exponent));
    const Column<Vec<Real>> column = negative_column(z);
    sums.negatives.weight += sum(e);
    sums.negative_value += sum(e * column.loss);
    return e * column.dlogit;
  }
  const Vec<Real> e = live * exp_negative(below_maximum(Vec<Real>(sums.negatives.max) - z));
  sums.negatives.weight += sum(e);
  if (objective.label_smoothing > 0) sums.negative_value += sum(live * z);
  return e;
}

template <class Stored, class Real>
NCE_INLINE void add_target(const SampledLoss& p, ExampleSums<Real>& sums, Real z, Real label) {
  if (p.objective.kind == ObjectiveKind::kAdversarial) {
    sums.target_loss += static_cast<Real>(p.objective.positive_weight) * binary_column(z, label).loss;
  } else {
    add(sums.targets, z);
    sums.target_score += z;
  }
}

// Takes a tile into the sums: z are its corrected scores. Writes the weights of its rows, 0 for targets.
template <class Stored, class Real>
NCE_INLINE void weigh_tile(const SampledLoss& p, const Tile<Stored, Real>& tile, Real* z, Real* weight, Real* gradient,
                           ExampleSums<Real>& sums) {
  for (int i = 0; i < tile.positives; ++i) {
    add_target<Stored>(p, sums, z[i], tile.label[i]);
  }
  alignas(64) Real live[kTileRows], exponent[kTileRows];
  const Real temperature =
      p.objective.kind == ObjectiveKind::kAdversarial ? static_cast<Real>(p.objective.temperature) : Real(1);
  for (int i = 0; i < kTileRows; ++i) {
    const bool negative = i >= tile.positives && i < tile.count;
    live[i] = negative ? Real(1) : Real(0);
    exponent[i] = negative ? nce::bounded(temperature * z[i]) : -infinity_of<Real>();
    weight[i] = Real(0);
  }
  if (tile.count == tile.positives) return;
  const auto larger = [](auto a, auto b) NCE_INLINE_LAMBDA { return a > b ? a : b; };
  const Real factor = raise_max(sums.negatives, largest(map(larger, load(exponent), load(exponent + kLanes))));
  if (factor < Real(1)) {
    if (p.objective.kind == ObjectiveKind::kAdversarial) sums.negative_value *= factor;
    for (int64_t d = 0; d < p.dim; d += kLanes) store(gradient + d, load(gradient + d) * Vec<Real>(factor));
  }
  for (int i = 0; i < tile.count; i += kLanes) {
    store(weight + i, add_negatives(p.objective, sums, load(z + i), load(live + i)));
  }
  sums.n_negatives += static_cast<Real>(tile.count - tile.positives);
}

// The last tile of an example is in: its loss, and what was kept turned into derivatives.
template <class Stored, class Real>
NCE_INLINE void finish_example(const SampledLoss& p, const Tile<Stored, Real>& tile, const ExampleSums<Real>& sums,
                               Real* gradient) {
  const Normaliser<Real> n = normalise(p.objective, sums, tile.n_positive, p.uniform_labels, tile.log_rest);
  static_cast<Real*>(p.loss)[tile.example] = n.loss;
  if (!p.dlogit) return;

  const int64_t columns = p.n_targets + p.n_negatives;
  Real* dlogit = static_cast<Real*>(p.dlogit) + tile.example * columns;
  const int32_t* id = p.ids + tile.example * columns;
  const Real label = p.uniform_labels ? Real(1) / static_cast<Real>(tile.n_positive) : Real(1);
  for (int64_t t = 0; t < p.n_targets; ++t) {
    if (id[t] < 0) {
      dlogit[t] = Real(0);
    } else if (p.objective.kind == ObjectiveKind::kAdversarial) {
      dlogit[t] = static_cast<Real>(p.objective.positive_weight) * binary_column(dlogit[t], label).dlogit;
    } else {
      dlogit[t] = softmax_target_dlogit(n, dlogit[t]);
    }
  }
  int64_t c = p.n_targets;
  for (; c + kLanes <= columns; c += kLanes) store(dlogit + c, negative_dlogits(p.objective, n, load(dlogit + c)));
  if (c < columns) {
    store_first(dlogit + c, negative_dlogits(p.objective, n, load_first(dlogit + c, columns - c)), columns - c);
  }

  if (p.grad_hidden) {
    // A smoothed label gives every row a second, equal weight, known only now: the rows are read again, from the cache.
    const bool again = n.smooth > Real(0);
    const Real scale = again ? Real(0) : n.scale;
    for (int64_t d = 0; d < p.dim; d += kLanes) store(gradient + d, load(gradient + d) * Vec<Real>(scale));
    for (int64_t i = 0; i < (again ? columns : p.n_targets); ++i) {
      if (dlogit[i] == Real(0)) continue;
      const Stored* row = static_cast<const Stored*>(p.weight) + id[i] * p.weight_stride;
      add_rows<1>(&row, dlogit + i, p.dim, gradient);
    }
  }
}

}  // namespace nce::NCE_SIMD_NAMESPACE
