// Row gradients that are never in memory: where the sum of a row is finished, it goes into an optimizer's step or into
// a norm. See row_grad.cuh for the sums and row_step.cuh for the steps.
#pragma once

#include "row_grad_join.cuh"
#include "row_step.cuh"

namespace nce::cuda {

// What finished sums are for. kSquares: the squares of what the step will see of the gradient, which row-wise Adagrad
// needs of the whole row before it steps. kNorm: the squares of the gradient itself and of the bias's.
enum class Pass : int { kStep, kSquares, kNorm };

struct SegmentSteps {
  RowGradTiles tiles;  // its rows are never written, and its classes were listed by list_segments
  RowStep step;
  Pass pass;
  int64_t n_rows;       // segments at most
  const void* settled;  // SettledRow
  bool settled_each;    // [n_rows] of them; else one
  bool norm_of_bias;    // for kNorm: whether the bias's gradient counts
  double* squares;      // [n_rows, n_squares], zero before: sums of squares of each slice of each row
  int64_t n_squares;
};

template <class Stored, class Elements>
__device__ __forceinline__ void finish_segment(const SegmentSteps& p, int64_t rank, uint32_t segment_class, int first,
                                               int slice, int lane, const Compute<Stored>* sums, Compute<Stored> bias) {
  using Real = Compute<Stored>;
  if (rank >= p.n_rows) return;
  const int64_t row = segment_class;
  const bool is_first = slice == 0 && lane == 0;
  const Elements elements{p.step, row, first};
  if (p.pass == Pass::kNorm) {
    double square = p.norm_of_bias && is_first ? static_cast<double>(bias) * static_cast<double>(bias) : 0.0;
    if (p.tiles.rows) square += elements.squares_of(sums);
    square = warp_sum(square);
    if (lane == 0) p.squares[rank * p.n_squares + slice] = square;
    return;
  }
  if (!has_row(p.step, row)) return;
  const auto numbers = settled_numbers(static_cast<const SettledRow<Real>*>(p.settled) + (p.settled_each ? rank : 0));
  if (p.pass == Pass::kSquares) {
    const double square = warp_sum(elements.squares(numbers, sums));
    if (lane == 0) p.squares[rank * p.n_squares + slice] = square;
    return;
  }
  const bool row_wise = p.step.rule == StepRule::kRowwiseAdagrad;
  elements.step(numbers, sums, row_wise ? static_cast<const Real*>(p.step.second)[row] : Real(0));
  if (is_first && p.tiles.bias) narrow(bias, static_cast<Stored*>(p.tiles.bias) + rank);
}

template <class Stored, class Elements>
struct FinishSegment {
  static constexpr bool kLong = true;
  const SegmentSteps& p;
  template <class Sums>
  __device__ __forceinline__ void operator()(const Sums& s, int64_t rank, uint32_t segment_class) const {
    finish_segment<Stored, Elements>(p, rank, segment_class, s.element, s.slice, s.lane, s.sums, s.bias);
  }
};

template <class Stored, class Hidden, Access kAccess>
__global__ void __launch_bounds__(kStepThreads, 4)
    segment_steps_kernel(const __grid_constant__ SegmentSteps p, int n_slices) {
  using Elements = ElementSteps<Stored, kPerVector<Hidden>, kAccess == Access::kBytes16>;
  sum_tiles<Stored, Hidden, kAccess>(p.tiles, n_slices, FinishSegment<Stored, Elements>{p});
}

template <class Stored>
__global__ void __launch_bounds__(kJoinWarps* kWarp)
    join_steps_kernel(const __grid_constant__ SegmentSteps p, int n_slices) {
  using Elements = ElementSteps<Stored, kJoinElements, false, kWarp>;
  join_tiles<Compute<Stored>>(
      p.tiles, n_slices, [&](const Crossing& c, const PartialSum<Compute<Stored>>& sum, int lane) {
        const int64_t rank = int64_t{p.tiles.segments_before[c.tile + 1]} - 1;
        finish_segment<Stored, Elements>(p, rank, class_of(p.tiles, c), c.slice * kJoinSlice + lane, c.slice, lane,
                                         sum.element, sum.bias);
      });
}

// Adds up the squares of each row's slices, and their mean to row-wise Adagrad's state.
template <class Real>
__global__ void __launch_bounds__(256) add_squares_kernel(const __grid_constant__ SegmentSteps p) {
  const int64_t n_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.n_rows; i += n_threads) {
    const int64_t row = p.tiles.segment_class[i];
    if (!has_row(p.step, row)) continue;
    double total = 0;
    for (int64_t s = 0; s < p.n_squares; ++s) total += p.squares[i * p.n_squares + s];
    static_cast<Real*>(p.step.second)[row] += static_cast<Real>(total / static_cast<double>(p.step.dim));
  }
}

// sums[c] = sum of the c-th of n_sums equal parts of values[0 .. n - 1], a warp for each.
static __global__ void __launch_bounds__(256)
    sum_parts_kernel(const double* values, int64_t n, int64_t n_sums, double* sums) {
  const int lane = threadIdx.x % kWarp;
  const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  const int64_t each = (n + n_sums - 1) / n_sums;
  for (int64_t c = blockIdx.x * (blockDim.x / kWarp) + warp_of_block(); c < n_sums; c += n_warps) {
    const int64_t end = (c + 1) * each < n ? (c + 1) * each : n;
    double sum = 0;
#pragma unroll 4
    for (int64_t i = c * each + lane; i < end; i += kWarp) sum += values[i];
    sum = warp_sum(sum);
    if (lane == 0) sums[c] = sum;
  }
}

constexpr int64_t kNormParts = 1024;

// Slices that a row is cut into, by segment_steps_kernel and by join_steps_kernel.
struct StepSlices {
  int64_t sums, joins;
  int64_t most() const { return sums > joins ? sums : joins; }
};

inline StepSlices step_slices(int64_t dim, bool with_rows, Storage hidden) {
  const int64_t slice = kWarp * (16 / bytes_of(hidden));
  return with_rows ? StepSlices{(dim + slice - 1) / slice, (dim + kJoinSlice - 1) / kJoinSlice} : StepSlices{1, 1};
}

// How hidden, weights and states are read: all by 16 bytes, or all by elements.
template <class Hidden>
Access step_access(const SegmentSteps& p, Storage storage) {
  const int64_t size = sizeof(Hidden);
  const Access access = access_of(p.tiles.hidden, p.tiles.hidden_stride * size, p.tiles.dim * size);
  const bool wide =
      access == Access::kBytes16 && (p.pass == Pass::kNorm || wide_steps(p.step, storage, kPerVector<Hidden>));
  return wide ? Access::kBytes16 : size == 8 ? Access::kBytes8 : Access::kElements;
}

}  // namespace nce::cuda
