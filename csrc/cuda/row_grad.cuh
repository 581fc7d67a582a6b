// The row gradient: pairs (class, dlogit), sorted by class, are summed into one row per class. No atomics and a fixed
// order, so that it repeats bit for bit.
//
// The sorted pairs are cut into tiles of equal size, a warp for each, so that the work is even however skewed the
// classes are. A segment (the pairs of one class) inside a tile is finished there. One that crosses tiles leaves a
// partial sum in each, and the tile in which it begins adds these up in their order.
#pragma once

#include "../row_grad.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace nce::cuda {

constexpr uint32_t kNoClass = 0xFFFFFFFFu;  // the id -1, sorted behind all classes

// Pairs of a tile: few, so that a small batch occupies the whole device; more for a large one, because every tile may
// leave two partial rows in memory.
inline int64_t tile_pairs_for(int64_t n_pairs) { return n_pairs <= (int64_t{1} << 19) ? 64 : 256; }

struct RowGradTiles {
  int64_t dim, n_pairs, n_tiles, tile_pairs;
  ExampleOf examples;
  const uint32_t* classes;  // [n_pairs], sorted
  const uint32_t* pairs;    // [n_pairs], which pair each was
  const void* dlogit;       // compute, [batch, columns]
  const void* grad_loss;    // compute, [batch]
  int64_t grad_loss_stride;
  const void* hidden;
  int64_t hidden_stride;

  const uint32_t* segments_before;  // [n_tiles + 1]: segments that begin before each tile; null if by_class
  bool by_class;                    // row of a class is its number (dense), else the rank of its segment (COO)
  void* rows;                       // of the weight's storage; null: no rows are summed
  void* bias;                       // likewise
  int64_t* segment_class;           // COO: the class of each segment, or null
  void* partial_rows;               // compute, [2 n_tiles, dim]: of what enters a tile, and of what leaves it
  void* partial_bias;               // compute, [2 n_tiles]
};

// A gradient of fixed size has rows to spare: they get class 0 and the value 0.
template <class Stored>
__global__ void __launch_bounds__(256) clear_spare_rows_kernel(const uint32_t* n_segments, int64_t n_rows, int64_t dim,
                                                               int64_t* segment_class, Stored* rows, Stored* bias) {
  const int64_t first = *n_segments, n_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first + thread; i < n_rows; i += n_threads) {
    segment_class[i] = 0;
    if (bias) bias[i] = Stored{};
  }
  if (rows == nullptr) return;
  for (int64_t i = first * dim + thread; i < n_rows * dim; i += n_threads) rows[i] = Stored{};
}

template <class Stored, class Hidden, Access kAccess>
struct SegmentSums {
  using Real = Compute<Stored>;
  static constexpr int kPer = kPerVector<Hidden>;
  static constexpr int kRows = 4;  // hidden vectors in flight

  const RowGradTiles& p;
  const int64_t tile;
  const int slice;
  const int lane = threadIdx.x % kWarp;
  const int dim = static_cast<int>(p.dim), element = (slice * kWarp + lane) * kPer;

  Real sums[kPer], bias;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int e = 0; e < kPer; ++e) sums[e] = Real(0);
    bias = Real(0);
  }

  // This lane's elements of a row of p.rows or p.partial_rows. Where hidden is read by 16 bytes, D is a multiple of
  // kPer, and every lane has all of its elements or none.
  template <class Out>
  __device__ __forceinline__ void store(Out* row) const {
    Out narrowed[kPer];
#pragma unroll
    for (int e = 0; e < kPer; ++e) narrow(sums[e], narrowed + e);
    store_elements_of<kPer, kAccess == Access::kBytes16>(row, element, dim, narrowed);
  }

  __device__ __forceinline__ void write(int64_t row, uint32_t segment_class) const {
    if (p.rows) store(static_cast<Stored*>(p.rows) + row * p.dim);
    if (slice > 0 || lane > 0) return;
    if (p.bias) narrow(bias, static_cast<Stored*>(p.bias) + row);
    if (p.segment_class) p.segment_class[row] = segment_class;
  }

  __device__ __forceinline__ void write_partial(bool leaves) const {
    const int64_t at = 2 * tile + (leaves ? 1 : 0);
    if (p.rows) store(static_cast<Real*>(p.partial_rows) + at * p.dim);
    if (slice == 0 && lane == 0) static_cast<Real*>(p.partial_bias)[at] = bias;
  }

  __device__ __forceinline__ Vector load_hidden(int64_t from, bool wanted) const {
    const auto* row = reinterpret_cast<const char*>(static_cast<const Hidden*>(p.hidden) + from);
    const int at = element * static_cast<int>(sizeof(Hidden)), bytes = dim * static_cast<int>(sizeof(Hidden));
    return load_vector<Hidden, kAccess>(row, at, bytes, p.rows && wanted);
  }

  __device__ __forceinline__ void add(Real c, const Vector& x) {
    const auto part = unpack<Hidden>(x);
#pragma unroll
    for (int e = 0; e < kPer; ++e) sums[e] = multiply_add(c, static_cast<Real>(part.element[e]), sums[e]);
    bias += c;
  }

  // Adds the pairs of `count` lanes, of which those in `ends` are the last of their segments, a segment after the
  // other: registers that hold hidden vectors are free where a segment is finished, and the code for that is there
  // once.
  template <class Finish>
  __device__ __forceinline__ void add_by_segment(const Finish& finish, Real coefficient, int64_t offset, uint32_t own,
                                                 int count, uint32_t ends, bool& entered, int64_t& rank) {
    for (int j = 0; j < count;) {
      // Pairs to the end of the open segment; 0 if it goes on behind these lanes.
      const int until = __ffs(static_cast<int>(ends >> j));
      const bool ended = until > 0 && until <= kRows;
      const int n = ended ? until : count - j < kRows ? count - j : kRows;
      Vector x[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        x[r] = load_hidden(__shfl_sync(kAllLanes, offset, j + r), r < n);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Real c = __shfl_sync(kAllLanes, coefficient, j + r);
        add(r < n ? c : Real(0), x[r]);
      }
      j += n;
      if (!ended) continue;
      const uint32_t segment_class = __shfl_sync(kAllLanes, own, j - 1);
      if (entered) {
        write_partial(false);
      } else {
        finish(*this, rank++, segment_class);
      }
      entered = false;
      clear();
    }
  }

  // finish(*this, row, class) gets the segments that begin and end in this tile. Finish::kLong: its code is long, and
  // is to be there once.
  template <class Finish>
  __device__ __forceinline__ void run(const Finish& finish) {
    const int64_t first = tile * p.tile_pairs;
    const int64_t last = first + p.tile_pairs < p.n_pairs ? first + p.tile_pairs : p.n_pairs;
    bool entered = first > 0 && p.classes[first - 1] == p.classes[first];  // the open segment began before
    int64_t rank = p.segments_before ? p.segments_before[tile] : 0;
    bool open = false;
    clear();
    for (int64_t begin = first; begin < last; begin += kWarp) {
      const int64_t i = begin + lane;
      uint32_t own = kNoClass, next = kNoClass;
      Real coefficient = Real(0);
      int64_t offset = 0;
      if (i < last) own = p.classes[i];
      if (own != kNoClass) {
        if (i + 1 < p.n_pairs) next = p.classes[i + 1];
        const uint32_t pair = p.pairs[i];
        const int64_t example = example_of(p.examples, pair);
        const Real grad_loss = static_cast<const Real*>(p.grad_loss)[example * p.grad_loss_stride];
        coefficient = static_cast<const Real*>(p.dlogit)[pair] * grad_loss;
        offset = example * p.hidden_stride;
      }
      const int count = __popc(__ballot_sync(kAllLanes, own != kNoClass));  // those without a class come last
      const uint32_t ends = __ballot_sync(kAllLanes, own != kNoClass && next != own);
      if constexpr (Finish::kLong) {
        add_by_segment(finish, coefficient, offset, own, count, ends, entered, rank);
      } else {
        for (int j = 0; j < count; j += kRows) {
          Vector x[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            x[r] = load_hidden(__shfl_sync(kAllLanes, offset, j + r), j + r < count);
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const Real c = __shfl_sync(kAllLanes, coefficient, j + r);
            const uint32_t segment_class = __shfl_sync(kAllLanes, own, j + r);
            add(c, x[r]);
            if (j + r < count && ((ends >> (j + r)) & 1u)) {
              if (entered) {
                write_partial(false);
              } else {
                finish(*this, p.by_class ? static_cast<int64_t>(segment_class) : rank++, segment_class);
              }
              entered = false;
              clear();
            }
          }
        }
      }
      if (count > 0) open = !((ends >> (count - 1)) & 1u);
    }
    if (open) write_partial(!entered);
  }
};

struct WriteRow {
  static constexpr bool kLong = false;
  template <class Sums>
  __device__ __forceinline__ void operator()(const Sums& sums, int64_t row, uint32_t segment_class) const {
    sums.write(row, segment_class);
  }
};

// n_slices: how many times kWarp vectors of hidden make a row. Slices are the outer loop: all tiles of one read the
// same part of hidden, which then stays in the second-level cache.
template <class Stored, class Hidden, Access kAccess, class Finish>
__device__ __forceinline__ void sum_tiles(const RowGradTiles& p, int n_slices, const Finish& finish) {
  const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t item = blockIdx.x * (blockDim.x / kWarp) + warp_of_block(); item < p.n_tiles * n_slices;
       item += n_warps) {
    const int slice = static_cast<int>(item / p.n_tiles);
    SegmentSums<Stored, Hidden, kAccess>{p, item - slice * p.n_tiles, slice}.run(finish);
  }
}

template <class Stored, class Hidden, Access kAccess>
__global__ void __launch_bounds__(256) segment_sums_kernel(const __grid_constant__ RowGradTiles p, int n_slices) {
  sum_tiles<Stored, Hidden, kAccess>(p, n_slices, WriteRow{});
}

}  // namespace nce::cuda
