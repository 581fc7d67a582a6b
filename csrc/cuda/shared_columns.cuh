// The columns of shared negatives, of one example at a time: objective, sums over them, derivatives in the place of the
// logits.
//
// An objective over the whole example goes over them twice, once for the sums and once for the derivatives. In between
// the scores stay in shared memory where they fit; else the logits are read again.
#pragma once

#include "../example_objective.h"
#include "../shared_loss.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace nce::cuda {

constexpr int kSharedWarps = 8;  // of a block, at most

// Elements of a row that a block keeps in shared memory between two passes: all, or none if they are too many.
template <class Real>
__host__ __device__ inline int64_t held_columns(const SharedLoss& p) {
  constexpr int64_t kWide = 16 / static_cast<int64_t>(sizeof(Real)),
                    kMost = 32 * 1024 / static_cast<int64_t>(sizeof(Real));
  const bool whole = p.objective.kind != ObjectiveKind::kBinary;
  return whole && p.n_columns <= kMost ? (p.n_columns + kWide - 1) / kWide * kWide : 0;
}

// What a warp tells the others of its columns.
template <class Real>
struct ColumnSums {
  ExponentSum<Real> negatives;
  Real negative_value, n_negatives;
};

template <class Real>
struct alignas(16) SharedMemory {
  Real dot[2][kSharedWarps];
  ColumnSums<Real> columns[kSharedWarps];
  Real loss[kSharedWarps], derivatives[kSharedWarps];
};

template <class Real>
size_t shared_loss_bytes(const SharedLoss& p) {
  return sizeof(SharedMemory<Real>) + static_cast<size_t>(held_columns<Real>(p)) * sizeof(Real);
}

template <class Real>
struct SharedColumns {
  static constexpr int kWide = 16 / static_cast<int>(sizeof(Real));

  const SharedLoss& p;
  const int lane = threadIdx.x % kWarp, warp = warp_of_block(), n_warps = blockDim.x / kWarp;
  const int thread = threadIdx.x, n_threads = blockDim.x;
  const uint32_t n_columns = static_cast<uint32_t>(p.n_columns);
  SharedMemory<Real>& shared = *shared_memory<SharedMemory<Real>>();
  const bool held = held_columns<Real>(p) > 0;

  int64_t example;
  Real log_z, factor;           // factor: of every derivative
  uint32_t hit_begin, hit_end;  // columns that may be hits

  struct Scores {
    Real z[kWide];      // -inf: no column
    Real count[kWide];  // how often a column counts
  };

  __device__ __forceinline__ Real* logits() const { return static_cast<Real*>(p.logits) + example * p.logits_stride; }
  __device__ __forceinline__ int64_t target(int64_t t) const { return p.target[example * p.n_targets + t]; }
  __device__ __forceinline__ bool adversarial() const { return p.objective.kind == ObjectiveKind::kAdversarial; }
  __device__ __forceinline__ bool wide_logits() const {
    return reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.logits_stride % kWide == 0;
  }
  __device__ __forceinline__ Real sum_of_warps(const Real* partial) const {
    Real sum = Real(0);
#pragma unroll 1
    for (int w = 0; w < n_warps; ++w) sum += partial[w];
    return sum;
  }
  // Where the thread to which these columns belong keeps their scores.
  __device__ __forceinline__ Vector* held_scores(uint32_t first) const {
    return reinterpret_cast<Vector*>(&shared + 1) + first / kWide;
  }

  // kWide numbers of a row from column `first` on; 0 beyond the last one. Other threads may be writing the row.
  __device__ __forceinline__ void read(const Real* row, uint32_t first, bool wide, Real* out) const {
    const bool all = first + kWide <= n_columns;
    if (wide) {
      const Vector v = read_changing16(row + first, all);
      std::memcpy(out, v.word, 16);
    }
    if (!wide || !all) {
#pragma unroll
      for (uint32_t e = 0; e < kWide; ++e) out[e] = first + e < n_columns ? read_changing(row + first + e) : Real(0);
    }
  }

  // Of a row that nothing writes.
  __device__ __forceinline__ void read_shared(const void* row, uint32_t first, Real* out) const {
    const Real* from = static_cast<const Real*>(row) + first;
    if (reinterpret_cast<uintptr_t>(row) % 16 == 0 && first + kWide <= n_columns) {
      std::memcpy(out, reinterpret_cast<const Vector*>(from)->word, 16);
    } else {
#pragma unroll
      for (uint32_t e = 0; e < kWide; ++e) out[e] = first + e < n_columns ? from[e] : Real(0);
    }
  }

  __device__ __forceinline__ void write(uint32_t first, bool wide, const Real* values) const {
    Real* row = logits() + first;
    if (wide && first + kWide <= n_columns) {
      Vector v;
      std::memcpy(v.word, values, 16);
      *reinterpret_cast<Vector*>(row) = v;
    } else {
#pragma unroll
      for (uint32_t e = 0; e < kWide; ++e) {
        if (first + e < n_columns) row[e] = values[e];
      }
    }
  }

  __device__ __forceinline__ bool is_hit(uint32_t column) const {
    const int32_t* range = p.accidental_hits + 2 * example * p.n_targets;
    bool hit = false;
#pragma unroll 1
    for (int64_t t = 0; t < p.n_targets; ++t) {
      hit |= target(t) != p.ignore_index && static_cast<int64_t>(column) >= range[2 * t] &&
             static_cast<int64_t>(column) < range[2 * t + 1];
    }
    return hit;
  }

  __device__ __forceinline__ void begin(Real log_z_of_example) {
    log_z = log_z_of_example;
    hit_begin = hit_end = 0;
    if (!p.accidental_hits) return;
    const int32_t* range = p.accidental_hits + 2 * example * p.n_targets;
#pragma unroll 1
    for (int64_t t = 0; t < p.n_targets; ++t) {
      if (target(t) == p.ignore_index || range[2 * t] >= range[2 * t + 1]) continue;
      const auto begin = static_cast<uint32_t>(range[2 * t]), end = static_cast<uint32_t>(range[2 * t + 1]);
      hit_begin = hit_begin == hit_end || begin < hit_begin ? begin : hit_begin;
      hit_end = end > hit_end ? end : hit_end;
    }
  }

  __device__ __forceinline__ void count_columns(uint32_t first, Real* count) const {
    if (p.multiplicity) return read_shared(p.multiplicity, first, count);
#pragma unroll
    for (int e = 0; e < kWide; ++e) count[e] = Real(1);
  }

  // From logits to scores.
  __device__ __forceinline__ Scores scores(uint32_t first, const Real* logit) const {
    Scores s;
    Real shift[kWide];
    read_shared(p.column_shift, first, shift);
    count_columns(first, s.count);
#pragma unroll
    for (uint32_t e = 0; e < kWide; ++e) {
      const bool live = first + e < n_columns && s.count[e] != Real(0);
      s.z[e] = live ? clamp_finite(logit[e] + (shift[e] - log_z)) : -infinity_of<Real>();
    }
    if (first < hit_end && first + kWide > hit_begin) {
#pragma unroll
      for (uint32_t e = 0; e < kWide; ++e) {
        if (is_hit(first + e)) s.z[e] = -infinity_of<Real>();
      }
    }
    return s;
  }

  __device__ __forceinline__ Real exponent_of(Real z) const {
    return adversarial() ? bounded(static_cast<Real>(p.objective.temperature) * z) : z;
  }

  __device__ __forceinline__ void take(const Scores& s, ColumnSums<Real>& sums) const {
    Real most = -infinity_of<Real>();
#pragma unroll
    for (int e = 0; e < kWide; ++e) most = larger_of(most, s.z[e]);
    const Real rescale = raise_max(sums.negatives, exponent_of(most));
    if (adversarial()) sums.negative_value *= rescale;
#pragma unroll
    for (int e = 0; e < kWide; ++e) {
      if (s.z[e] == -infinity_of<Real>()) continue;
      const Real weight = s.count[e] * exp_negative(sums.negatives.max - exponent_of(s.z[e]));
      sums.negatives.weight += weight;
      sums.n_negatives += s.count[e];
      sums.negative_value += adversarial() ? weight * binary_column(s.z[e], Real(0)).loss : s.count[e] * s.z[e];
    }
  }

  // Takes in what another has summed up.
  __device__ __forceinline__ void merge(const ColumnSums<Real>& other, ColumnSums<Real>& sums) const {
    const Real rescale = raise_max(sums.negatives, other.negatives.max);
    const Real factor_of_other =
        other.negatives.max == sums.negatives.max ? Real(1) : exp_negative(sums.negatives.max - other.negatives.max);
    sums.negatives.weight += other.negatives.weight * factor_of_other;
    sums.n_negatives += other.n_negatives;
    sums.negative_value = adversarial() ? sums.negative_value * rescale + other.negative_value * factor_of_other
                                        : sums.negative_value + other.negative_value;
  }

  // The block's sums, in all threads, from the threads'.
  __device__ __forceinline__ ColumnSums<Real> total(ColumnSums<Real> sums) const {
    const ColumnSums<Real> none{{-infinity_of<Real>(), Real(0)}, Real(0), Real(0)};
    ColumnSums<Real> of_warp = none;
    of_warp.negatives.max = warp_max(sums.negatives.max);
    merge(sums, of_warp);
    of_warp.negatives.weight = warp_sum(of_warp.negatives.weight);
    of_warp.negative_value = warp_sum(of_warp.negative_value);
    of_warp.n_negatives = warp_sum(of_warp.n_negatives);
    if (lane == 0) shared.columns[warp] = of_warp;
    __syncthreads();
    sums = none;
#pragma unroll 1
    for (int w = 0; w < n_warps; ++w) merge(shared.columns[w], sums);
    return sums;
  }

  __device__ __forceinline__ uint32_t first_column() const { return static_cast<uint32_t>(thread) * kWide; }
  __device__ __forceinline__ uint32_t step() const { return static_cast<uint32_t>(n_threads) * kWide; }

  // f(first column, scores) for this thread's columns. The next logits are on their way meanwhile.
  template <class F>
  __device__ __forceinline__ void each_scores(F&& f) const {
    const bool wide = wide_logits();
    Real next[kWide];
    if (first_column() < n_columns) read(logits(), first_column(), wide, next);
#pragma unroll 1
    for (uint32_t first = first_column(); first < n_columns; first += step()) {
      Real logit[kWide];
#pragma unroll
      for (int e = 0; e < kWide; ++e) logit[e] = next[e];
      if (first + step() < n_columns) read(logits(), first + step(), wide, next);
      Scores s = scores(first, logit);
      f(first, s);
    }
  }

  // Both passes over the columns for objectives over the whole example. Fills in `sums`, of which the targets' part is
  // there, and returns this thread's sum of derivatives.
  __device__ __forceinline__ Real whole_columns(ExampleSums<Real>& sums, int64_t n_positive, Real log_not_target,
                                                Normaliser<Real>& n) const {
    ColumnSums<Real> mine{{-infinity_of<Real>(), Real(0)}, Real(0), Real(0)};
    each_scores([&](uint32_t first, const Scores& s) {
      if (held) std::memcpy(held_scores(first)->word, s.z, 16);
      take(s, mine);
    });
    const ColumnSums<Real> all = total(mine);
    sums.negatives = all.negatives;
    sums.negative_value = all.negative_value;
    sums.n_negatives = all.n_negatives;
    n = normalise(p.objective, sums, n_positive, p.uniform_labels, log_not_target);
    if (thread == 0) static_cast<Real*>(p.loss)[example] = n.loss;
    Real derivatives = Real(0);
    if (!p.needs_derivatives) return derivatives;
    const bool wide = wide_logits();
#pragma unroll 1
    for (uint32_t first = first_column(); first < n_columns; first += step()) {
      Scores s;
      if (held) {
        std::memcpy(s.z, held_scores(first)->word, 16);
        count_columns(first, s.count);
      } else {
        Real logit[kWide];
        read(logits(), first, wide, logit);
        s = scores(first, logit);
      }
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        const bool live = s.z[e] != -infinity_of<Real>();
        s.z[e] = live ? factor * s.count[e] * negative_dlogit(p.objective, n, s.z[e]) : Real(0);
        derivatives += s.z[e];
      }
      write(first, wide, s.z);
    }
    return derivatives;
  }

  // Each column by itself. Returns this thread's sum of derivatives, and adds to `loss`.
  __device__ __forceinline__ Real binary_columns(Real& loss) const {
    Real derivatives = Real(0);
    each_scores([&](uint32_t first, Scores& s) {
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        const bool live = s.z[e] != -infinity_of<Real>();
        const Column<Real> column = binary_column(s.z[e], Real(0));
        if (live) loss += s.count[e] * column.loss;
        s.z[e] = live ? factor * s.count[e] * column.dlogit : Real(0);
        derivatives += s.z[e];
      }
      if (p.needs_derivatives) write(first, wide_logits(), s.z);
    });
    return derivatives;
  }
};

}  // namespace nce::cuda
