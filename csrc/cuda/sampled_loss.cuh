// The fused forward pass: draw, gather, dot, correct, objective, gradient of hidden. Each row is read from memory once
// and stays in registers until all of that is done.
//
// An objective over the whole example does not know its derivatives before the last row: the gradient is summed with
// weights that lack a factor, while p.dlogit keeps the scores; then both are put right, and the targets' rows, whose
// weights have another factor, are read again.
//
// An example belongs to one warp; if a row is too long for the registers of one, to all warps of a block, which add
// up their partial dot products through shared memory. In a warp, groups of lanes work on different rows, and each
// has several rows in flight: that is what hides the latency of random reads. Candidate columns come in tiles of 32,
// one to a lane; where an example has few, a tile holds those of several examples, so that the draw and its latency
// are paid once for all of them.
#pragma once

#include "candidates.cuh"
#include "example_rows.cuh"
#include "whole_example.cuh"

namespace nce::cuda {

template <class Stored, class Shape, Access kAccess, Purpose kPurpose>
struct SampledLossWarp : ExampleRows<Stored, Shape, kAccess> {
  using Rows = ExampleRows<Stored, Shape, kAccess>;
  using Real = typename Rows::Real;
  using Rows::element_of, Rows::load_row, Rows::hidden_part, Rows::add_in_memory, Rows::scale_gradient;
  using Rows::kPer, Rows::kVectors, Rows::kGroup, Rows::kRows, Rows::kGroups, Rows::kBatch, Rows::kShare;
  using Rows::kSplit, Rows::kHold, Rows::gradient;
  using Rows::p, Rows::lane, Rows::group, Rows::in_group, Rows::warp, Rows::n_warps, Rows::dim, Rows::n_vectors;
  static constexpr bool kSeveral = Shape::kSeveral;
  static constexpr bool kWhole = kPurpose == Purpose::kWhole;

  Real loss;                     // but for kWhole
  WholeSums<Real, kShare> sums;  // for kWhole

  // Candidates first .. first + kBatch - 1 of a tile, which are in `mine`, one to a lane, and of which the bits of
  // `live` tell whether they count. The first is column `column` of its example.
  __device__ __forceinline__ void batch(int64_t example, uint32_t column, int first, uint32_t live,
                                        const Candidate<Real>& mine, Real positive_label, Real scale) {
    Vector row[kHold ? kRows : 1][kHold ? kVectors : 1];
    const char* address[kRows];
    bool present[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int slot = r * kGroups + group;
      const int32_t id = __shfl_sync(kAllLanes, mine.id, (first + slot) % kWarp);
      present[r] = (live >> slot) & 1u;
      address[r] = static_cast<const char*>(p.weight) +
                   static_cast<int64_t>(present[r] ? id : 0) * p.weight_stride * static_cast<int>(sizeof(Stored));
      if constexpr (kHold) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) row[r][v] = load_row(address[r], v, present[r]);
      }
    }

    Real dot[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) dot[r] = Real(0);
#pragma unroll(kVectors)
    for (int v = 0; v < (kHold ? kVectors : n_vectors); ++v) {
      Real x[kPer];
      hidden_part(example, v, x);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const auto w = unpack<Stored>(kHold ? row[r][kHold ? v : 0] : load_row(address[r], v, present[r]));
#pragma unroll
        for (int e = 0; e < kPer; ++e) dot[r] = multiply_add(x[e], w.element[e], dot[r]);
      }
    }
    Real z = sums_scattered<kGroup, kRows>(dot, in_group);
    if constexpr (kSplit) z = this->sum_of_warps(z);

    // The objective once a row: this lane has the dot product of column `own`, as have kShare - 1 others.
    const int own = in_group / kShare * kGroups + group;
    z += __shfl_sync(kAllLanes, mine.offset, (first + own) % kWarp);
    column += own;
    const bool target = column < static_cast<uint32_t>(p.n_targets);
    const Real label = target ? positive_label : Real(0);
    const bool own_live = (live >> own) & 1u, speaks = own_live && in_group % kShare == 0 && warp == 0;
    Real dlogit, kept;
    if constexpr (kWhole) {
      kept = own_live ? clamp_finite(z) : Real(0);
      Real factor;
      if (sums.make_room(p.objective, kept, own_live && !target, factor)) scale_gradient(example, factor);
      dlogit = sums.take(p.objective, kept, own_live && target, own_live && !target, label);
    } else {
      const Column<Real> objective = binary_column(z, label);
      if (target) scale *= static_cast<Real>(p.objective.positive_weight);
      kept = dlogit = own_live ? scale * objective.dlogit : Real(0);
      if (speaks) loss += scale * objective.loss;
    }
    if (speaks && p.dlogit) {
      static_cast<Real*>(p.dlogit)[example * (p.n_targets + p.n_negatives) + column] = kept;
    }

    if (p.grad_hidden) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Real d = __shfl_sync(kAllLanes, dlogit, group * kGroup + r * kShare);
        if constexpr (kHold) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const auto w = unpack<Stored>(row[r][v]);
#pragma unroll
            for (int e = 0; e < kPer; ++e) {
              gradient[v * kPer + e] = multiply_add(d, w.element[e], gradient[v * kPer + e]);
            }
          }
        } else if (present[r]) {
          add_in_memory(example, address[r], d);
        }
      }
    }
  }

  // An example without a target: loss 0. A bad one: loss NaN. Neither has a gradient.
  __device__ __forceinline__ void skip(int64_t example, bool bad) const {
    const int64_t n_columns = p.n_targets + p.n_negatives;
    const int n_threads = n_warps * kWarp, thread = warp * kWarp + lane;
    if (thread == 0) static_cast<Real*>(p.loss)[example] = bad ? static_cast<Real>(NAN) : Real(0);
    if (p.ids) {
      for (int64_t c = thread; c < n_columns; c += n_threads) {
        p.ids[example * n_columns + c] = -1;
        static_cast<Real*>(p.dlogit)[example * n_columns + c] = Real(0);
      }
    }
    if (p.grad_hidden) {
      for (int d = thread; d < dim; d += n_threads) static_cast<Real*>(p.grad_hidden)[example * p.dim + d] = Real(0);
    }
  }

  // All columns of an example are in: its loss, and what was kept turned into derivatives.
  __device__ __forceinline__ void finish_whole(int64_t example, int n_positive, Real positive_label) {
    const auto n_targets = static_cast<uint32_t>(p.n_targets);
    const auto n_columns = static_cast<uint32_t>(p.n_targets + p.n_negatives);
    const Normaliser<Real> n = normalise(p.objective, sums.total(p.objective, n_positive), n_positive, p.uniform_labels,
                                         log_not_target<Real>(p, example));
    if (warp == 0 && lane == 0) static_cast<Real*>(p.loss)[example] = n.loss;
    if (!p.dlogit) return;
    Real* dlogit = static_cast<Real*>(p.dlogit) + example * n_columns;
    meet();
    for (uint32_t c = warp * kWarp + lane; c < n_columns; c += n_warps * kWarp) {
      dlogit[c] = column_dlogit(p.objective, n, dlogit[c], c < n_targets, positive_label);
    }
    if (!p.grad_hidden) return;
    meet();
    // A smoothed label gives every row a second, equal weight, known only now: the rows are read again.
    const bool again = n.smooth > Real(0);
    scale_gradient(example, again ? Real(0) : n.scale);
    if (again) {
      add_columns<kRows>(example, n_columns);
    } else {
      add_columns<1>(example, n_targets);
    }
  }

  // The gradient's part of the example's first `end` columns, kCount rows of each group of lanes at a time.
  template <int kCount>
  __device__ __forceinline__ void add_columns(int64_t example, uint32_t end) {
    const int64_t base = example * (p.n_targets + p.n_negatives);
#pragma unroll 1
    for (uint32_t first = 0; first < end; first += kCount * kGroups) {
      const char* address[kCount];
      Real d[kCount];
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
        const uint32_t column = first + r * kGroups + group;
        const bool present = column < end;
        d[r] = present ? static_cast<const Real*>(p.dlogit)[base + column] : Real(0);
        const int32_t id = present ? p.ids[base + column] : 0;
        address[r] = static_cast<const char*>(p.weight) + id * p.weight_stride * static_cast<int>(sizeof(Stored));
      }
      this->add_rows(example, address, d);
    }
  }

  // What lanes have written of the example is there for all that work on it.
  __device__ __forceinline__ void meet() const {
    if constexpr (kSplit) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  // Examples first_example .. first_example + count - 1; more than one only if all their columns fit in a tile.
  __device__ __forceinline__ void run(int64_t first_example, int count) {
    const auto n_targets = static_cast<uint32_t>(p.n_targets);
    const auto n_columns = static_cast<uint32_t>(p.n_targets + p.n_negatives);
    if (n_columns == 0) return skip(first_example, false);
    const int mine_of =
        kSeveral && count > 1 ? lane / static_cast<int>(n_columns) : 0;  // which example's candidate a lane has
    Census census = census_from<Real>(p, first_example, kWarp, lane);
    for (uint32_t tile = 0; tile * kWarp < n_columns; ++tile) {
      const int64_t my_example = first_example + mine_of;
      const uint32_t my_column = mine_of < count ? tile * kWarp + lane - mine_of * n_columns : n_columns;
      // Read again for every tile: kept, it would take registers from the rows.
      const Seed seed = read_seed(p.seed, p.seed_stride);
      const Candidate<Real> mine = candidate<Stored, kWhole, Real>(p, seed, my_example, my_column);
      const uint32_t live = __ballot_sync(kAllLanes, mine.state == ColumnState::kLive);
      uint32_t present = 0, bad = 0;
      if (tile == 0) {
        present = __ballot_sync(kAllLanes, my_column < n_targets && mine.state != ColumnState::kAbsent);
        bad = __ballot_sync(kAllLanes, mine.state == ColumnState::kBad);
      }
      const uint32_t left = n_columns - tile * kWarp;
      const int width = left < kWarp ? static_cast<int>(left) : kWarp;  // candidates of an example
      const uint32_t mask = kAllLanes >> (kWarp - width);
#pragma unroll 1
      for (int i = 0; i < (kSeveral ? count : 1); ++i) {
        const int64_t example = first_example + i;
        const int base = i * width;
        if (tile == 0) {
          census.positives = (kSeveral && count > 1 ? 0 : census.positives) + __popc((present >> base) & mask);
          census.bad = (!(kSeveral && count > 1) && census.bad) || ((bad >> base) & mask) != 0;
          if (census.positives == 0 || census.bad) {
            skip(example, census.positives > 0);
            if (!kSeveral || count == 1) return;
            continue;
          }
          this->load_hidden(example);
          if constexpr (kWhole) {
            sums.clear();
          } else {
            loss = Real(0);
          }
        }
        if (p.ids && warp == 0 && mine_of == i && my_column < n_columns) {
          const int64_t pair = example * (p.n_targets + p.n_negatives) + my_column;
          p.ids[pair] = mine.id;
          if (mine.state != ColumnState::kLive) {
            static_cast<Real*>(p.dlogit)[pair] = kWhole ? -infinity_of<Real>() : Real(0);
          }
        }
        const Real positive_label = p.uniform_labels ? Real(1) / static_cast<Real>(census.positives) : Real(1);
        const Real scale = p.mean_candidates ? Real(1) / static_cast<Real>(census.positives + p.n_negatives) : Real(1);
        const uint32_t live_here = (live >> base) & mask;
        if constexpr (kWhole) sums.n_live += __popc(live_here);
#pragma unroll 1
        for (int first = 0; first < width; first += kBatch) {
          batch(example, tile * kWarp + first, base + first, live_here >> first, mine, positive_label, scale);
        }
        if (left > kWarp) continue;
        if constexpr (kWhole) {
          finish_whole(example, census.positives, positive_label);
        } else {
          const Real sum = warp_sum(loss);
          if (warp == 0 && lane == 0) static_cast<Real*>(p.loss)[example] = sum;
        }
        if (p.grad_hidden && kHold) this->store_gradient(example);
      }
    }
  }
};

// Bytes of shared memory that a block of n_warps needs.
template <class Stored, class Shape>
constexpr size_t sampled_loss_shared_bytes(int n_warps) {
  if (!Shape::kSplit) return 0;
  const size_t staged = Shape::kHold ? size_t{kWarp} * Shape::kVectors * kPerVector<Stored> * n_warps : 0;
  return (2 * kWarp * Shape::kRows + staged) * sizeof(Compute<Stored>);
}

// Examples whose candidates share a tile: as many as fit, but evenly over the rounds that a worker makes, and one where
// there are workers enough. No result depends on it.
__device__ __forceinline__ int examples_of_tile(const SampledLoss& p, int64_t n_workers) {
  const int64_t n_columns = p.n_targets + p.n_negatives;
  const int64_t fit = n_columns > 0 && n_columns < kWarp ? kWarp / n_columns : 1;
  const int64_t of_worker = (p.batch + n_workers - 1) / n_workers, rounds = (of_worker + fit - 1) / fit;
  return static_cast<int>((of_worker + rounds - 1) / rounds);
}

template <class Stored, class Shape, Access kAccess, Purpose kPurpose>
__global__ void __launch_bounds__(Shape::kThreads, blocks_for<Shape, kAccess, kPurpose>())
    sampled_loss_kernel(const __grid_constant__ SampledLoss p) {
  SampledLossWarp<Stored, Shape, kAccess, kPurpose> work{{p}};
  const int64_t per_block = Shape::kSplit ? 1 : blockDim.x / kWarp, n_workers = gridDim.x * per_block;
  const int64_t worker = blockIdx.x * per_block + (Shape::kSplit ? 0 : warp_of_block());
  const int count = Shape::kSeveral ? examples_of_tile(p, n_workers) : 1;
  for (int64_t first = worker * count; first < p.batch; first += n_workers * count) {
    const int64_t left = p.batch - first;
    work.run(first, left < count ? static_cast<int>(left) : count);
  }
}

}  // namespace nce::cuda
