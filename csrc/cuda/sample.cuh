// Noise ids: one thread for two slots, which share a block of random words.
#pragma once

#include "../noise.h"
#include "../philox.h"
#include "simt.cuh"

namespace nce::cuda {

struct Sample {
  Noise noise;
  const int64_t* seed;
  int64_t seed_stride;
  int64_t rows, columns;
  int64_t* ids;  // [rows, columns]
};

__device__ __forceinline__ int64_t drawn_id(const Noise& noise, uint64_t bits) {
  if (noise.kind == NoiseKind::kLogUniform) return log_uniform_id(noise, bits);
  const Bucket bucket = bucket_of(noise, bits);
  if (noise.kind == NoiseKind::kUniform) return bucket.index;
  const Vector entry = read_once16(noise.table + bucket.index);
  return bucket.fraction < entry.word[0] ? bucket.index : entry.word[1];
}

static __global__ void __launch_bounds__(256) sample_kernel(const __grid_constant__ Sample p) {
  const Seed seed = read_seed(p.seed, p.seed_stride);
  const int64_t pairs = (p.columns + 1) / 2, n_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.rows * pairs; i += n_threads) {
    const int64_t example = i / pairs, pair = i - example * pairs;
    const Words words = random_words(seed, static_cast<uint32_t>(example), static_cast<uint32_t>(pair));
    const int64_t slot = 2 * pair;
    int64_t* out = p.ids + example * p.columns + slot;
    const bool both = slot + 1 < p.columns;
    const int64_t even = drawn_id(p.noise, draw_bits(words, 0));
    const int64_t odd = both ? drawn_id(p.noise, draw_bits(words, 1)) : 0;
    out[0] = even;
    if (both) out[1] = odd;
  }
}

}  // namespace nce::cuda
