// An example's hidden vector, the rows it is multiplied with and the gradient that they add up to, spread over the
// lanes of a warp, or over those of all warps of a block.
#pragma once

#include "pack.cuh"
#include "reduce.cuh"
#include "shapes.cuh"

namespace nce::cuda {

template <class Stored, class Shape, Access kAccess>
struct ExampleRows {
  using Real = Compute<Stored>;
  static constexpr int kPer = kPerVector<Stored>;
  static constexpr int kVectors = Shape::kVectors, kGroup = Shape::kGroup, kRows = Shape::kRows;
  static constexpr int kGroups = kWarp / kGroup;  // of lanes, in a warp
  static constexpr int kBatch = kRows * kGroups;  // rows in flight in a warp
  static constexpr int kShare = kGroup / kRows;   // lanes that end up with the same row's dot product
  static constexpr bool kSplit = Shape::kSplit, kHold = Shape::kHold;
  static constexpr bool kStaged = kSplit && kHold;  // hidden lies in shared memory, not in registers

  const SampledLoss& p;
  const int lane = threadIdx.x % kWarp, group = lane / kGroup, in_group = lane % kGroup;
  const int warp = kSplit ? warp_of_block() : 0, n_warps = kSplit ? blockDim.x / kWarp : 1;
  const int dim = static_cast<int>(p.dim), row_bytes = dim * static_cast<int>(sizeof(Stored));
  const int n_vectors = kHold ? kVectors : (dim + n_warps * kWarp * kPer - 1) / (n_warps * kWarp * kPer);

  Real hidden[kStaged || !kHold ? 1 : kVectors * kPer];
  Real gradient[kHold ? kVectors * kPer : 1];
  int exchange = 0;  // which of two buffers of partial dot products is next

  // First element of this lane's vector v. Warps take turns, so that all have work however long a row is.
  __device__ __forceinline__ int element_of(int v) const { return ((v * n_warps + warp) * kGroup + in_group) * kPer; }
  __device__ __forceinline__ bool wide_hidden() const {
    return wide_rows(p.hidden, p.hidden_stride, p.dim, p.hidden_storage, kPer);
  }
  __device__ __forceinline__ Real* partial_dots() const { return shared_memory<Real>(); }
  __device__ __forceinline__ Real* staged_hidden() const { return shared_memory<Real>() + 2 * kWarp * kRows; }

  __device__ __forceinline__ void load_hidden(int64_t example) {
    if constexpr (!kHold) {
      for (int v = 0; v < n_vectors; ++v) {
        for (int e = 0; e < kPer; ++e) {
          if (p.grad_hidden && element_of(v) + e < dim) *gradient_in_memory(example, element_of(v) + e) = Real(0);
        }
      }
      return;
    }
    const int64_t offset = example * p.hidden_stride;
    if constexpr (kStaged) {
#pragma unroll 1
      for (int v = 0; v < kVectors; ++v) {
        Real part[kPer];
        load_elements<kPer>(p.hidden, offset, p.hidden_storage, element_of(v), dim, wide_hidden(), part);
#pragma unroll
        for (int e = 0; e < kPer; ++e) staged_hidden()[element_of(v) + e] = part[e];  // read back by this lane alone
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        load_elements<kPer>(p.hidden, offset, p.hidden_storage, element_of(v), dim, wide_hidden(), hidden + v * kPer);
      }
    }
#pragma unroll
    for (int i = 0; i < (kHold ? kVectors * kPer : 1); ++i) gradient[i] = Real(0);
  }

  __device__ __forceinline__ Real* gradient_in_memory(int64_t example, int element) const {
    return static_cast<Real*>(p.grad_hidden) + example * p.dim + element;
  }

  __device__ __forceinline__ void hidden_part(int64_t example, int v, Real* out) const {
    if constexpr (kStaged) {
#pragma unroll
      for (int e = 0; e < kPer; ++e) out[e] = staged_hidden()[element_of(v) + e];
    } else if constexpr (kHold) {
#pragma unroll
      for (int e = 0; e < kPer; ++e) out[e] = hidden[v * kPer + e];
    } else {
      load_elements<kPer>(p.hidden, example * p.hidden_stride, p.hidden_storage, element_of(v), dim, wide_hidden(),
                          out);
    }
  }

  __device__ __forceinline__ Vector load_row(const char* row, int v, bool wanted) const {
    const int at = element_of(v) * static_cast<int>(sizeof(Stored));
    return load_vector<Stored, kAccess>(row, at, row_bytes, wanted);
  }

  // Sums over all warps of the dot product of the row that this lane has ended up with.
  __device__ __forceinline__ Real sum_of_warps(Real partial) {
    Real* buffer = partial_dots() + exchange * kWarp * kRows;
    exchange ^= 1;  // the barrier of the next batch comes before anyone writes to this buffer again
    const int row = in_group / kShare;
    if (in_group % kShare == 0) buffer[warp * kRows + row] = partial;
    __syncthreads();
    Real sum = Real(0);
    for (int w = 0; w < n_warps; ++w) sum += buffer[w * kRows + row];
    return sum;
  }

  __device__ __forceinline__ void add_in_memory(int64_t example, const char* address, Real d) const {
    for (int v = 0; v < n_vectors; ++v) {
      const auto w = unpack<Stored>(load_row(address, v, true));
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        if (element_of(v) + e >= dim) continue;
        Real* sum = gradient_in_memory(example, element_of(v) + e);  // this lane's alone
        *sum = multiply_add(d, w.element[e], *sum);
      }
    }
  }

  // gradient += sum over r of d[r] * row r, of rows that lie at `address`, where d[r] is not 0.
  template <int kCount>
  __device__ __forceinline__ void add_rows(int64_t example, const char* const (&address)[kCount],
                                           const Real (&d)[kCount]) {
    if constexpr (kHold) {
      Vector row[kCount][kVectors];
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) row[r][v] = load_row(address[r], v, d[r] != Real(0));
      }
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const auto w = unpack<Stored>(row[r][v]);
#pragma unroll
          for (int e = 0; e < kPer; ++e) {
            gradient[v * kPer + e] = multiply_add(d[r], w.element[e], gradient[v * kPer + e]);
          }
        }
      }
    } else {
      for (int r = 0; r < kCount; ++r) {
        if (d[r] != Real(0)) add_in_memory(example, address[r], d[r]);
      }
    }
  }

  // gradient *= factor; a factor of 0 clears it.
  __device__ __forceinline__ void scale_gradient(int64_t example, Real factor) {
    if constexpr (kHold) {
#pragma unroll
      for (int i = 0; i < kVectors * kPer; ++i) gradient[i] = factor == Real(0) ? Real(0) : gradient[i] * factor;
    } else if (p.grad_hidden) {
      for (int v = 0; v < n_vectors; ++v) {
        for (int e = 0; e < kPer; ++e) {
          if (element_of(v) + e >= dim) continue;
          Real* sum = gradient_in_memory(example, element_of(v) + e);
          *sum = factor == Real(0) ? Real(0) : *sum * factor;
        }
      }
    }
  }

  __device__ __forceinline__ void store_gradient(int64_t example) {
    Real* out = static_cast<Real*>(p.grad_hidden) + example * p.dim;
#pragma unroll
    for (int offset = kGroup; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int i = 0; i < kVectors * kPer; ++i) gradient[i] += __shfl_xor_sync(kAllLanes, gradient[i], offset);
    }
    constexpr int kWide = 16 / static_cast<int>(sizeof(Real));
    const bool wide = dim % kWide == 0 && reinterpret_cast<uintptr_t>(p.grad_hidden) % 16 == 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v % kGroups != group) continue;  // all groups have the same sums now
      const int first = element_of(v);
      if (wide) {
#pragma unroll
        for (int e = 0; e < kPer; e += kWide) {
          Vector packed;
          std::memcpy(packed.word, gradient + v * kPer + e, 16);
          if (first + e < dim) *reinterpret_cast<Vector*>(out + first + e) = packed;
        }
      } else {
#pragma unroll
        for (int e = 0; e < kPer; ++e) {
          if (first + e < dim) out[first + e] = gradient[v * kPer + e];
        }
      }
    }
  }
};

}  // namespace nce::cuda
