// The epilogue between the matrix products of shared negatives, for a range of examples: scores of the targets, the
// objective, and all derivatives in the place of the logits. A masked column has score -inf.
#pragma once

#include "../shared_loss.h"
#include "whole_example.h"

namespace nce::NCE_SIMD_NAMESPACE {

// f(first column, how to load 16 numbers, how to store them), for every vector of a row; the last one may be short.
template <class Function>
NCE_INLINE void each_vector(int64_t n, const Function& f) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    f(
        c, [](const auto* from) NCE_INLINE_LAMBDA { return load(from); },
        [](auto* to, const auto& v) NCE_INLINE_LAMBDA { store(to, v); });
  }
  if (const int64_t rest = n - c; rest > 0) {
    f(
        c, [rest](const auto* from) NCE_INLINE_LAMBDA { return load_first(from, rest); },
        [rest](auto* to, const auto& v) NCE_INLINE_LAMBDA { store_first(to, v, rest); });
  }
}

template <class Stored, class Real>
struct SharedExample {
  const SharedLoss& p;
  const int64_t example;
  Real* const logits = static_cast<Real*>(p.logits) + example * p.logits_stride;
  const int64_t* const target = p.target + example * p.n_targets;
  Real factor = Real(1);  // of every derivative
  ExampleSums<Real> sums = no_columns<Real>();
  Real loss = Real(0), derivatives = Real(0);

  NCE_INLINE_LAMBDA inline void mask_hits() const {
    if (!p.accidental_hits) return;
    const int32_t* range = p.accidental_hits + example * p.n_targets * 2;
    for (int64_t t = 0; t < p.n_targets; ++t) {
      if (target[t] == p.ignore_index) continue;
      for (int64_t c = range[2 * t]; c < range[2 * t + 1]; ++c) logits[c] = -infinity_of<Real>();
    }
  }

  NCE_INLINE_LAMBDA inline Real log_z() const {
    return p.log_z ? static_cast<const Real*>(p.log_z)[example * p.log_z_stride] : Real(0);
  }

  // How often columns count: 0 where masked.
  template <class Load>
  NCE_INLINE_LAMBDA inline Vec<Real> counts(int64_t c, const Vec<Real>& z, const Load& load_lanes) const {
    const Real lowest = sizeof(Real) == 4 ? static_cast<Real>(-FLT_MAX) : static_cast<Real>(-DBL_MAX);
    Vec<Real> count(Real(1));
    if (p.multiplicity) count = load_lanes(static_cast<const Real*>(p.multiplicity) + c);
    return map([](auto v, auto low, auto n) NCE_INLINE_LAMBDA { return v < low ? decltype(n){} : n; }, z,
               Vec<Real>(lowest), count);
  }

  // Lanes beyond the last column are no columns.
  template <class Load>
  NCE_INLINE_LAMBDA inline Vec<Real> read_score(int64_t c, const Load& load_lanes) const {
    Vec<Real> z = load_lanes(logits + c);
    if (c + kLanes > p.n_columns) {
      alignas(64) Real lanes[kLanes];
      store(lanes, z);
      for (int64_t i = p.n_columns - c; i < kLanes; ++i) lanes[i] = -infinity_of<Real>();
      z = load(lanes);
    }
    return z;
  }

  NCE_INLINE_LAMBDA inline void binary_columns() {
    const Vec<Real> shift_of_all(log_z()), scale(factor);
    Vec<Real> losses(Real(0)), slopes(Real(0));
    each_vector(p.n_columns, [&](int64_t c, const auto& load_lanes, const auto& store_lanes) NCE_INLINE_LAMBDA {
      const Vec<Real> logit = read_score(c, load_lanes), count = counts(c, logit, load_lanes);
      const Vec<Real> shift = load_lanes(static_cast<const Real*>(p.column_shift) + c) - shift_of_all;
      const Column<Vec<Real>> column = negative_column(clamp_finite(clamp_finite(logit) + shift));
      losses = fma(column.loss, count, losses);
      const Vec<Real> slope = column.dlogit * count * scale;
      slopes = slopes + slope;
      if (p.needs_derivatives) store_lanes(logits + c, slope);
    });
    loss += sum(losses);
    derivatives += sum(slopes);
  }

  // The columns' part of the sums. Keeps the weights in the place of the logits, or the scores if labels are smoothed.
  NCE_INLINE_LAMBDA inline void weigh_columns() {
    const Vec<Real> shift_of_all(log_z());
    const bool adversarial = p.objective.kind == ObjectiveKind::kAdversarial,
               keep_scores = p.objective.label_smoothing > 0;
    Vec<Real> most(-infinity_of<Real>()), count_of_all(Real(0));
    const auto larger = [](auto a, auto b) NCE_INLINE_LAMBDA { return a > b ? a : b; };
    each_vector(p.n_columns, [&](int64_t c, const auto& load_lanes, const auto& store_lanes) NCE_INLINE_LAMBDA {
      const Vec<Real> logit = read_score(c, load_lanes);
      const Vec<Real> shift = load_lanes(static_cast<const Real*>(p.column_shift) + c) - shift_of_all;
      const auto masked_stay = [](auto l, auto low, auto z) NCE_INLINE_LAMBDA { return l < low ? l : z; };
      const Real lowest = sizeof(Real) == 4 ? static_cast<Real>(-FLT_MAX) : static_cast<Real>(-DBL_MAX);
      Vec<Real> z = map(masked_stay, logit, Vec<Real>(lowest), clamp_finite(clamp_finite(logit) + shift));
      if (p.multiplicity) {
        const auto counted = [](auto v, auto n) NCE_INLINE_LAMBDA { return n > 0 ? v : decltype(v){} - INFINITY; };
        z = map(counted, z, load_lanes(static_cast<const Real*>(p.multiplicity) + c));
      }
      most = map(larger, most, z);
      store_lanes(logits + c, z);
    });
    Real highest = largest(most);
    if (adversarial && highest > -infinity_of<Real>()) {
      highest = nce::bounded(highest * static_cast<Real>(p.objective.temperature));
    }
    raise_max(sums.negatives, highest);
    each_vector(p.n_columns, [&](int64_t c, const auto& load_lanes, const auto& store_lanes) NCE_INLINE_LAMBDA {
      const Vec<Real> z = read_score(c, load_lanes), count = counts(c, z, load_lanes);
      const Vec<Real> weight = add_negatives(p.objective, sums, clamp_finite(z), count);
      count_of_all = count_of_all + count;
      if (!keep_scores) store_lanes(logits + c, weight);
    });
    sums.n_negatives += sum(count_of_all);
  }

  NCE_INLINE_LAMBDA inline void write_columns(const Normaliser<Real>& n) {
    Vec<Real> slopes(Real(0));
    each_vector(p.n_columns, [&](int64_t c, const auto& load_lanes, const auto& store_lanes) NCE_INLINE_LAMBDA {
      Vec<Real> slope;
      if (p.objective.label_smoothing > 0) {
        const Vec<Real> z = read_score(c, load_lanes);
        slope = negative_dlogits(p.objective, n, z) * counts(c, z, load_lanes) * Vec<Real>(factor);
      } else {
        slope = load_lanes(logits + c) * Vec<Real>(n.scale * factor);
      }
      slopes = slopes + slope;
      store_lanes(logits + c, slope);
    });
    derivatives += sum(slopes);
  }

  NCE_INLINE_LAMBDA inline void write_nothing() const {
    static_cast<Real*>(p.loss)[example] = Real(0);
    if (!p.needs_derivatives) return;
    std::memset(logits, 0, p.n_columns * sizeof(Real));
    for (int64_t t = 0; t < p.n_targets; ++t) {
      p.target_ids[example * p.n_targets + t] = -1;
      static_cast<Real*>(p.target_dlogit)[example * p.n_targets + t] = Real(0);
    }
    static_cast<Real*>(p.grad_shift)[example] = Real(0);
    if (p.grad_hidden) std::memset(static_cast<Real*>(p.grad_hidden) + example * p.dim, 0, p.dim * sizeof(Real));
  }

  // x and gradient hold padded_dim(dim) numbers, z n_targets. Returns the first bad target's index, or -1.
  NCE_INLINE_LAMBDA inline int64_t run(Real* x, Real* gradient, Real* z) {
    int64_t n_positive = 0;
    for (int64_t t = 0; t < p.n_targets; ++t) n_positive += target[t] != p.ignore_index;
    if (n_positive == 0) {
      write_nothing();
      return -1;
    }
    const bool whole = p.objective.kind != ObjectiveKind::kBinary;
    const Real scale = p.mean_candidates ? Real(1) / static_cast<Real>(n_positive + p.n_draws) : Real(1);
    factor = p.example_weight ? scale * static_cast<const Real*>(p.example_weight)[example] : scale;

    widen_hidden(p.hidden, example * p.hidden_stride, p.hidden_storage, p.dim, x);
    const Real positive_weight = static_cast<Real>(p.objective.positive_weight);
    const Real label = p.uniform_labels ? Real(1) / static_cast<Real>(n_positive) : Real(1);
    Real log_not_target = Real(0);
    for (int64_t t = 0; t < p.n_targets; ++t) {
      if (target[t] == p.ignore_index) continue;
      const int64_t at = example * p.n_targets + t;
      Real q = p.target_log_q ? static_cast<const Real*>(p.target_log_q)[at] : Real(0);
      if (target[t] < 0 || target[t] >= p.n_classes || !std::isfinite(q)) return at;
      if (!p.objective.correct_positive) {
        log_not_target = log_rest(q);
        q = Real(0);
      }
      const Stored* row = static_cast<const Stored*>(p.weight) + target[t] * p.weight_stride;
      dot_rows<1>(&row, &row, x, p.dim, false, z + t);
      if (p.bias) z[t] += load_one(static_cast<const Stored*>(p.bias) + target[t]);
      z[t] = nce::clamp_finite(z[t] - (q + (static_cast<Real>(p.offset) + log_z())));
      if (p.objective.kind == ObjectiveKind::kSoftmax) {
        add(sums.targets, z[t]);
        sums.target_score += z[t];
      } else {
        sums.target_loss += positive_weight * binary_column(z[t], label).loss;
      }
    }
    mask_hits();
    Normaliser<Real> n{};
    if (whole) {
      weigh_columns();
      n = normalise(p.objective, sums, n_positive, p.uniform_labels, log_not_target);
      loss = n.loss;
      if (p.needs_derivatives) write_columns(n);
    } else {
      binary_columns();
      loss = scale * (loss + sums.target_loss);
    }
    static_cast<Real*>(p.loss)[example] = loss;
    if (p.needs_derivatives) write_targets(n, label, z, gradient);
    return -1;
  }

  NCE_INLINE_LAMBDA inline void write_targets(const Normaliser<Real>& n, Real label, const Real* z, Real* gradient) {
    if (p.grad_hidden) std::memset(gradient, 0, static_cast<size_t>(padded_dim(p.dim)) * sizeof(Real));
    for (int64_t t = 0; t < p.n_targets; ++t) {
      const int64_t at = example * p.n_targets + t;
      const bool present = target[t] != p.ignore_index;
      Real slope = Real(0);
      if (present && p.objective.kind == ObjectiveKind::kSoftmax) {
        slope = factor * softmax_target_dlogit(n, z[t]);
      } else if (present) {
        slope = factor * static_cast<Real>(p.objective.positive_weight) * binary_column(z[t], label).dlogit;
      }
      p.target_ids[at] = present ? static_cast<int32_t>(target[t]) : -1;
      static_cast<Real*>(p.target_dlogit)[at] = slope;
      derivatives += slope;
      if (p.grad_hidden && present) {
        const Stored* row = static_cast<const Stored*>(p.weight) + target[t] * p.weight_stride;
        add_rows<1>(&row, &slope, p.dim, gradient);
      }
    }
    static_cast<Real*>(p.grad_shift)[example] = derivatives;
    if (p.grad_hidden) {
      std::memcpy(static_cast<Real*>(p.grad_hidden) + example * p.dim, gradient, p.dim * sizeof(Real));
    }
  }
};

// Returns the first bad target's index, or -1; a masked one is no error.
template <class Stored, class Real>
static int64_t shared_loss(const SharedLoss& p, int64_t begin, int64_t end, void* scratch) {
  Real* x = static_cast<Real*>(scratch);
  Real* gradient = x + padded_dim(p.dim);
  Real* z = gradient + padded_dim(p.dim);
  int64_t first_bad = -1;
  for (int64_t example = begin; example < end; ++example) {
    if (example + 1 < end) {  // the next target's row comes from anywhere
      const int64_t id = p.target[(example + 1) * p.n_targets];
      if (p.n_targets > 0 && id >= 0 && id < p.n_classes) {
        prefetch_row(static_cast<const Stored*>(p.weight) + id * p.weight_stride, p.dim, false);
      }
    }
    SharedExample<Stored, Real> one{p, example};
    const int64_t bad = one.run(x, gradient, z);
    if (first_bad < 0) first_bad = bad;
  }
  return first_bad;
}

}  // namespace nce::NCE_SIMD_NAMESPACE
