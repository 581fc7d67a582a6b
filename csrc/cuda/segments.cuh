// What comes before and after the sort of the pairs: their numbers, and where segments begin.
#pragma once

#include "row_grad.cuh"

namespace nce::cuda {

// Bits of a class that the sort must look at: those of 0 .. V - 1 and of the id -1, all of whose bits are set, so that
// cut to as many bits as V itself has it is larger than any class.
inline int sorted_bits(int64_t n_classes) {
  int bits = 0;
  while (n_classes >> bits) ++bits;
  return bits;
}

__device__ __forceinline__ bool begins_segment(const RowGradTiles& p, int64_t i) {
  const uint32_t own = p.classes[i];
  return own != kNoClass && (i == 0 || p.classes[i - 1] != own);
}

// counts[t] = segments that begin in tile t; counts[n_tiles] = 0, so that an exclusive sum ends with their number.
static __global__ void __launch_bounds__(256)
    count_segments_kernel(const __grid_constant__ RowGradTiles p, uint32_t* counts) {
  const int lane = threadIdx.x % kWarp;
  const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t tile = blockIdx.x * (blockDim.x / kWarp) + warp_of_block(); tile <= p.n_tiles; tile += n_warps) {
    uint32_t count = 0;
    for (int64_t i = tile * p.tile_pairs; i < (tile + 1) * p.tile_pairs && i < p.n_pairs; i += kWarp) {
      const bool begins = i + lane < p.n_pairs && begins_segment(p, i + lane);
      count += __popc(__ballot_sync(kAllLanes, begins));
    }
    if (lane == 0) counts[tile] = count;
  }
}

// segment_class[s] = class of segment s, as far as there is room.
static __global__ void __launch_bounds__(256)
    list_segments_kernel(const __grid_constant__ RowGradTiles p, int64_t n_rows) {
  const int lane = threadIdx.x % kWarp;
  const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t tile = blockIdx.x * (blockDim.x / kWarp) + warp_of_block(); tile < p.n_tiles; tile += n_warps) {
    int64_t rank = p.segments_before[tile];
    for (int64_t i = tile * p.tile_pairs; i < (tile + 1) * p.tile_pairs && i < p.n_pairs; i += kWarp) {
      const bool begins = i + lane < p.n_pairs && begins_segment(p, i + lane);
      const uint32_t all = __ballot_sync(kAllLanes, begins);
      const int64_t own = rank + __popc(all & ((1u << lane) - 1u));
      if (begins && own < n_rows) p.segment_class[own] = p.classes[i + lane];
      rank += __popc(all);
    }
  }
}

static __global__ void __launch_bounds__(256) number_pairs_kernel(uint32_t* pairs, int64_t n) {
  const int64_t n_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += n_threads) {
    pairs[i] = static_cast<uint32_t>(i);
  }
}

}  // namespace nce::cuda
