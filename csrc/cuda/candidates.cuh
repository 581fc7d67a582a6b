// The candidate columns of an example, one to a lane: targets first, then negatives, drawn here or given.
#pragma once

#include "../philox.h"
#include "../sampled_loss.h"
#include "pack.cuh"

namespace nce::cuda {

enum class ColumnState : int {
  kAbsent,  // no such column, or a target that is ignore_index
  kBad,     // an id out of range, or a class without a log q: the whole example gets loss NaN and no gradient
  kHit,     // a negative that is one of the targets, and is to be left out
  kLive,
};

template <class Real>
struct Candidate {
  int32_t id;   // -1 if absent or bad
  Real offset;  // what is added to the dot product: bias - log q - log k - log z
  ColumnState state;
};

__device__ __forceinline__ bool in_range(const SampledLoss& p, int64_t id) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(p.n_classes);
}

template <class Real>
__device__ __forceinline__ Real shift_of(const SampledLoss& p, int64_t example) {
  Real shift = static_cast<Real>(p.offset);
  if (p.log_z) shift += static_cast<const Real*>(p.log_z)[example * p.log_z_stride];
  return shift;
}

__device__ __forceinline__ bool is_target(const SampledLoss& p, int64_t example, int64_t id) {
  const int64_t* target = p.target + example * p.n_targets;
  bool found = false;
  for (int64_t t = 0; t < p.n_targets; ++t) found |= target[t] == id && id != p.ignore_index;
  return found;
}

// The log q that the caller gave for a column, or null.
template <class Real>
__device__ __forceinline__ const Real* given_log_q(const SampledLoss& p, int64_t example, uint32_t column) {
  const auto n_targets = static_cast<uint32_t>(p.n_targets);
  if (column < n_targets) {
    return p.target_log_q ? static_cast<const Real*>(p.target_log_q) + example * p.n_targets + column : nullptr;
  }
  if (!p.negative_log_q) return nullptr;
  return static_cast<const Real*>(p.negative_log_q) + example * p.negative_log_q_stride + (column - n_targets);
}

// A target and a drawn negative take the same path: an alias table then costs one load, which gives both an id and
// its log q.
template <class Stored, bool kWhole, class Real>
__device__ __forceinline__ Candidate<Real> candidate(const SampledLoss& p, const Seed& seed, int64_t example,
                                                     uint32_t column) {
  const auto n_targets = static_cast<uint32_t>(p.n_targets);
  const auto n_columns = static_cast<uint32_t>(p.n_targets + p.n_negatives);
  Candidate<Real> c{-1, Real(0), ColumnState::kAbsent};
  if (column >= n_columns) return c;

  const bool positive = column < n_targets, drawn = !positive && p.negatives == nullptr;
  uint32_t bucket, fraction = 0;
  if (drawn) {
    const uint32_t slot = column - n_targets;
    const uint64_t bits = draw_bits(random_words(seed, static_cast<uint32_t>(example), slot >> 1), slot);
    if (p.noise.kind == NoiseKind::kLogUniform) {
      bucket = static_cast<uint32_t>(log_uniform_id(p.noise, bits));
    } else {
      const Bucket b = bucket_of(p.noise, bits);
      bucket = b.index;
      fraction = b.fraction;
    }
  } else {
    const int64_t id = positive ? p.target[example * p.n_targets + column]
                                : p.negatives[example * p.negatives_stride + (column - n_targets)];
    if (positive && id == p.ignore_index) return c;
    if (!in_range(p, id)) {
      c.state = ColumnState::kBad;
      return c;
    }
    bucket = static_cast<uint32_t>(id);
  }

  const Real* given = drawn || !p.subtract_log_q ? nullptr : given_log_q<Real>(p, example, column);
  const bool alias = p.noise.kind == NoiseKind::kAlias;
  c.id = static_cast<int32_t>(bucket);
  Real log_q = Real(0);
  if (given) {
    log_q = *given;
  } else if (alias && (drawn || p.subtract_log_q)) {
    const Vector entry = read_once16(p.noise.table + bucket);
    const bool self = !drawn || fraction < entry.word[0];
    if (!self) c.id = static_cast<int32_t>(entry.word[1]);
    log_q = static_cast<Real>(__uint_as_float(self ? entry.word[2] : entry.word[3]));
  } else if (p.subtract_log_q) {
    log_q = static_cast<Real>(p.noise.kind == NoiseKind::kUniform ? p.noise.log_q_uniform
                                                                  : log_q_log_uniform(p.noise, bucket));
  }
  if (!p.subtract_log_q) log_q = Real(0);
  if (!(log_q - log_q == Real(0))) {  // infinite or NaN
    c.id = -1;
    c.state = ColumnState::kBad;
    return c;
  }
  if (kWhole && positive && !p.objective.correct_positive) log_q = Real(0);
  c.state = !positive && p.remove_hits && is_target(p, example, c.id) ? ColumnState::kHit : ColumnState::kLive;
  if (c.state == ColumnState::kLive) {
    Real bias = Real(0);
    if (p.bias) bias = static_cast<Real>(widen(static_cast<const Stored*>(p.bias)[c.id]));
    c.offset = bias - (log_q + shift_of<Real>(p, example));
  }
  return c;
}

// Whether a column whose id is given, not drawn, is bad; and, for a target, whether it is there.
struct GivenColumn {
  bool present, bad;
};

template <class Real>
__device__ __forceinline__ GivenColumn given_column(const SampledLoss& p, int64_t example, uint32_t column) {
  const auto n_targets = static_cast<uint32_t>(p.n_targets);
  const bool positive = column < n_targets;
  const int64_t id = positive ? p.target[example * p.n_targets + column]
                              : p.negatives[example * p.negatives_stride + (column - n_targets)];
  if (positive && id == p.ignore_index) return GivenColumn{false, false};
  if (!in_range(p, id)) return GivenColumn{true, true};
  if (!p.subtract_log_q) return GivenColumn{true, false};
  Real log_q = Real(0);
  if (const Real* given = given_log_q<Real>(p, example, column)) {
    log_q = *given;
  } else if (p.noise.kind == NoiseKind::kAlias) {
    log_q = static_cast<Real>(p.noise.table[id].log_q_self);
  }
  return GivenColumn{true, !(log_q - log_q == Real(0))};
}

// What must be known of an example before any of it is written.
struct Census {
  int positives;
  bool bad;
};

// Columns whose ids are given, from `first` on, counted by the lanes of a warp together.
template <class Real>
__device__ __forceinline__ Census census_from(const SampledLoss& p, int64_t example, uint32_t first, int lane) {
  const auto n_targets = static_cast<uint32_t>(p.n_targets);
  const uint32_t end = p.negatives ? static_cast<uint32_t>(p.n_targets + p.n_negatives) : n_targets;
  Census census{0, false};
  for (uint32_t base = first; base < end; base += kWarp) {
    const uint32_t column = base + lane;
    GivenColumn given{false, false};
    if (column < end) given = given_column<Real>(p, example, column);
    census.positives += __popc(__ballot_sync(kAllLanes, given.present && column < n_targets));
    census.bad |= __any_sync(kAllLanes, given.bad) != 0;
  }
  return census;
}

}  // namespace nce::cuda
