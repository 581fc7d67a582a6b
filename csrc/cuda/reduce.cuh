// Sums and maxima across the lanes of a warp, in an order that depends on nothing but the template.
#pragma once

#include "simt.cuh"

namespace nce::cuda {

// Of one value from each kShare neighbouring lanes, which have the same.
template <int kShare = 1, class Real>
__device__ __forceinline__ Real warp_sum(Real value) {
#pragma unroll
  for (int offset = kWarp / 2; offset >= kShare; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <int kShare = 1, class Real>
__device__ __forceinline__ Real warp_max(Real value) {
#pragma unroll
  for (int offset = kWarp / 2; offset >= kShare; offset /= 2) {
    const Real other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// In every group of kGroup lanes: the sums of kCount values over the group's lanes, one sum to a lane. Lane `l` of a
// group gets that of value l / (kGroup / kCount). Halving the number of values at each exchange takes
// kCount - 1 + log2(kGroup / kCount) shuffles instead of kCount log2(kGroup). Destroys `value`.
template <int kGroup, int kCount, class Real>
__device__ __forceinline__ Real sums_scattered(Real (&value)[kCount], int lane) {
  static_assert(kCount <= kGroup && (kCount & (kCount - 1)) == 0 && (kGroup & (kGroup - 1)) == 0);
  int offset = kGroup / 2;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const Real kept = upper ? value[i + half] : value[i];
      const Real sent = upper ? value[i] : value[i + half];
      value[i] = kept + __shfl_xor_sync(kAllLanes, sent, offset);
    }
    offset /= 2;
  }
#pragma unroll
  for (; offset > 0; offset /= 2) value[0] += __shfl_xor_sync(kAllLanes, value[0], offset);
  return value[0];
}

}  // namespace nce::cuda
