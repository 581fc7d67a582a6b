// Joins the partial sums of segments that cross tiles; see row_grad.cuh.
#pragma once

#include "row_grad.cuh"

namespace nce::cuda {

constexpr int kJoinWarps = 8;       // of a block
constexpr int kJoinElements = 4;    // of a lane
constexpr int64_t kJoinAlone = 32;  // tiles that one warp adds up by itself
constexpr int kJoinSlice = kWarp * kJoinElements;

// A segment to be finished: it begins in `tile` and enters the `n_entered` tiles behind it.
struct Crossing {
  int64_t tile, n_entered;
  int slice;
};

// The partial sums of tiles in ascending order, over one slice of a row; lane l has elements l, l + 32, ... of it.
template <class Real>
struct PartialSum {
  Real element[kJoinElements];
  Real bias;

  __device__ __forceinline__ void add(const RowGradTiles& p, int64_t at, int slice, int lane) {
    if (p.rows) {
      const Real* row = static_cast<const Real*>(p.partial_rows) + at * p.dim;
#pragma unroll
      for (int e = 0; e < kJoinElements; ++e) {
        const int d = slice * kJoinSlice + e * kWarp + lane;
        if (d < p.dim) element[e] += row[d];
      }
    }
    bias += static_cast<const Real*>(p.partial_bias)[at];
  }
};

// n_entered is 0 if no segment both begins in this tile and goes on in the next one.
__device__ __forceinline__ Crossing crossing_of(const RowGradTiles& p, int64_t tile, int slice) {
  Crossing c{tile, 0, slice};
  const int64_t first = tile * p.tile_pairs, end = first + p.tile_pairs;
  if (end >= p.n_pairs) return c;
  const uint32_t own = p.classes[end - 1];
  if (own == kNoClass || p.classes[end] != own) return c;
  if (first > 0 && p.classes[first - 1] == own) return c;  // it began before this tile
  // The last tile whose first pair is of the class: doubling steps, then halving ones.
  int64_t step = 1;
  while (tile + c.n_entered + step < p.n_tiles && p.classes[(tile + c.n_entered + step) * p.tile_pairs] == own) {
    c.n_entered += step;
    step *= 2;
  }
  for (; step > 0; step /= 2) {
    const int64_t probe = tile + c.n_entered + step;
    if (probe < p.n_tiles && p.classes[probe * p.tile_pairs] == own) c.n_entered += step;
  }
  return c;
}

__device__ __forceinline__ uint32_t class_of(const RowGradTiles& p, const Crossing& c) {
  return p.classes[(c.tile + 1) * p.tile_pairs];
}

template <class Stored>
__device__ __forceinline__ void write_joined(const RowGradTiles& p, const Crossing& c,
                                             const PartialSum<Compute<Stored>>& sum, int lane) {
  const uint32_t segment_class = class_of(p, c);
  const int64_t row = p.by_class ? static_cast<int64_t>(segment_class) : int64_t{p.segments_before[c.tile + 1]} - 1;
  if (p.rows) {
#pragma unroll
    for (int e = 0; e < kJoinElements; ++e) {
      const int d = c.slice * kJoinSlice + e * kWarp + lane;
      if (d < p.dim) narrow(sum.element[e], static_cast<Stored*>(p.rows) + row * p.dim + d);
    }
  }
  if (c.slice > 0 || lane > 0) return;
  if (p.bias) narrow(sum.bias, static_cast<Stored*>(p.bias) + row);
  if (p.segment_class) p.segment_class[row] = segment_class;
}

template <class Stored>
constexpr size_t join_shared_bytes() {
  return kJoinWarps * (sizeof(Crossing) + (kJoinSlice + 1) * sizeof(Compute<Stored>));
}

// Blocks of kJoinWarps warps. A warp looks at one tile, and finishes a segment of a few tiles alone; a longer one is
// left to the whole block, each warp taking an eighth of its tiles. finish(crossing, sum, lane) gets the segments.
template <class Real, class Finish>
__device__ __forceinline__ void join_tiles(const RowGradTiles& p, int n_slices, const Finish& finish) {
  auto* crossings = shared_memory<Crossing>();
  auto* parts = reinterpret_cast<Real*>(crossings + kJoinWarps);  // [kJoinWarps, kJoinSlice], then [kJoinWarps]
  Real* part_bias = parts + kJoinWarps * kJoinSlice;
  const int lane = threadIdx.x % kWarp, warp = warp_of_block();
  const int64_t n_items = p.n_tiles * n_slices, n_groups = (n_items + kJoinWarps - 1) / kJoinWarps;
  for (int64_t group = blockIdx.x; group < n_groups; group += gridDim.x) {
    const int64_t item = group * kJoinWarps + warp;
    Crossing mine{0, 0, 0};
    if (item < n_items) mine = crossing_of(p, item % p.n_tiles, static_cast<int>(item / p.n_tiles));
    if (mine.n_entered > 0 && mine.n_entered <= kJoinAlone) {
      PartialSum<Real> sum{};
      sum.add(p, 2 * mine.tile + 1, mine.slice, lane);
      for (int64_t t = 1; t <= mine.n_entered; ++t) sum.add(p, 2 * (mine.tile + t), mine.slice, lane);
      finish(mine, sum, lane);
      mine.n_entered = 0;
    }
    if (lane == 0) crossings[warp] = mine;
    if (!__syncthreads_or(mine.n_entered > 0)) continue;
    for (int w = 0; w < kJoinWarps; ++w) {
      const Crossing c = crossings[w];
      if (c.n_entered == 0) continue;
      const int64_t begin = c.n_entered * warp / kJoinWarps, end = c.n_entered * (warp + 1) / kJoinWarps;
      PartialSum<Real> sum{};
      if (warp == 0) sum.add(p, 2 * c.tile + 1, c.slice, lane);
#pragma unroll 4
      for (int64_t t = begin + 1; t <= end; ++t) sum.add(p, 2 * (c.tile + t), c.slice, lane);
#pragma unroll
      for (int e = 0; e < kJoinElements; ++e) parts[warp * kJoinSlice + e * kWarp + lane] = sum.element[e];
      if (lane == 0) part_bias[warp] = sum.bias;
      __syncthreads();
      if (warp == w) {
        PartialSum<Real> total{};
        for (int part = 0; part < kJoinWarps; ++part) {
#pragma unroll
          for (int e = 0; e < kJoinElements; ++e) total.element[e] += parts[part * kJoinSlice + e * kWarp + lane];
          total.bias += part_bias[part];
        }
        finish(c, total, lane);
      }
      __syncthreads();
    }
    __syncthreads();
  }
}

template <class Stored>
__global__ void __launch_bounds__(kJoinWarps* kWarp)
    join_segments_kernel(const __grid_constant__ RowGradTiles p, int n_slices) {
  join_tiles<Compute<Stored>>(p, n_slices, [&](const Crossing& c, const PartialSum<Compute<Stored>>& sum, int lane) {
    write_joined<Stored>(p, c, sum, lane);
  });
}

}  // namespace nce::cuda
