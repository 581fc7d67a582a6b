// The racy scatter of gradient rows: every pair is added to its row of the table by atomics, in no order (Recht et al.,
// "Hogwild!", NeurIPS 2011).
#pragma once

#include "../scatter_step.h"
#include "pack.cuh"

namespace nce::cuda {

constexpr int kScatterPer = 4;  // elements of an addition

// Lanes that share a row, and the slices of kVectors additions of each lane that a row is cut into.
struct ScatterShape {
  int group;
  int64_t n_slices;
};

template <int kVectors>
ScatterShape scatter_shape(int64_t dim) {
  const int64_t lanes = (dim + kScatterPer - 1) / kScatterPer;
  const int group = lanes <= 8 ? 8 : lanes <= 16 ? 16 : kWarp;
  const int64_t slice = kVectors * group * kScatterPer;
  return {group, (dim + slice - 1) / slice};
}

inline bool wide_scatter(const ScatterStep& p) {
  return access_of(p.weight, p.weight_stride * 4, p.dim * 4) == Access::kBytes16;
}

// A warp holds a slice of an example's hidden vector and walks the example's columns; if rows are short, groups of its
// lanes take a column each.
template <int kVectors, bool kWide>
__global__ void __launch_bounds__(256)
    scatter_step_kernel(const __grid_constant__ ScatterStep p, int group, int n_slices) {
  constexpr int kPer = kScatterPer;
  const int lane = threadIdx.x % kWarp, in_group = lane & (group - 1), n_groups = kWarp / group;
  const int dim = static_cast<int>(p.dim);
  const bool wide_hidden = wide_rows(p.hidden, p.hidden_stride, p.dim, p.hidden_storage, kPer);
  const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t item = blockIdx.x * (blockDim.x / kWarp) + warp_of_block(); item < p.batch * n_slices; item += n_warps) {
    const int64_t example = item / n_slices;
    const int slice = static_cast<int>(item - example * n_slices);
    const int first = (slice * kVectors * group + in_group) * kPer;
    float x[kVectors * kPer];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      load_elements<kPer>(p.hidden, example * p.hidden_stride, p.hidden_storage, first + v * group * kPer, dim,
                          wide_hidden, x + v * kPer);
    }
    const float scale = -p.rate * p.grad_loss[example * p.grad_loss_stride];
    for (int64_t begin = 0; begin < p.columns; begin += kWarp) {
      int id = -1;
      float coefficient = 0.0f;
      if (begin + lane < p.columns) {
        const int64_t pair = example * p.columns + begin + lane;
        id = p.ids[pair];
        if (id >= p.n_classes) id = -1;
        coefficient = scale * p.dlogit[pair];
        if (p.bias && slice == 0 && id >= 0) atomicAdd(p.bias + id, coefficient);
      }
      const auto left = p.columns - begin;
      const int count = left < kWarp ? static_cast<int>(left) : kWarp;
      for (int j = 0; j < count; j += n_groups) {
        const int row = __shfl_sync(kAllLanes, id, j + lane / group);
        const float c = __shfl_sync(kAllLanes, coefficient, j + lane / group);
        if (row < 0) continue;
        float* at = p.weight + row * p.weight_stride;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int element = first + v * group * kPer;
          float step[kPer];
#pragma unroll
          for (int e = 0; e < kPer; ++e) step[e] = c * x[v * kPer + e];
          if constexpr (kWide) {
            if (element < dim) add_in_place4(at + element, step);
          } else {
#pragma unroll
            for (int e = 0; e < kPer; ++e) {
              if (element + e < dim) atomicAdd(at + element + e, step[e]);
            }
          }
        }
      }
    }
  }
}

// Calls f(vectors of a lane as a constant).
template <class F>
void with_scatter_vectors(int64_t dim, F&& f) {
  if (dim <= kWarp * kScatterPer) return f(std::integral_constant<int, 1>{});
  return f(std::integral_constant<int, 4>{});
}

}  // namespace nce::cuda
