// Draws noise ids, a block of slots at a time so that the table's entries are fetched together.
#pragma once

#include "../noise.h"
#include "../philox.h"
#include "simd.h"

namespace nce::NCE_SIMD_NAMESPACE {

// bits[i] = the 64-bit draw of slot first + i, 0 <= i < n <= kLanes.
NCE_INLINE void draw_block(Seed seed, uint32_t example, int64_t first, int n, uint64_t* bits) {
  const int64_t first_pair = first / 2, n_pairs = (first + n - 1) / 2 - first_pair + 1;
  Words words[kLanes / 2 + 1];
  for (int64_t i = 0; i < n_pairs; ++i) words[i] = random_words(seed, example, static_cast<uint32_t>(first_pair + i));
  for (int i = 0; i < n; ++i) bits[i] = draw_bits(words[(first + i) / 2 - first_pair], first + i);
}

static void sample(const Noise& noise, Seed seed, int64_t columns, int64_t begin, int64_t end, int64_t* ids) {
  uint64_t bits[kLanes];
  for (int64_t i = begin; i < end;) {
    const int64_t example = i / columns, slot = i % columns;
    int64_t n = columns - slot < kLanes ? columns - slot : kLanes;
    if (n > end - i) n = end - i;
    draw_block(seed, static_cast<uint32_t>(example), slot, static_cast<int>(n), bits);
    if (noise.kind == NoiseKind::kLogUniform) {
      for (int64_t j = 0; j < n; ++j) ids[i + j] = log_uniform_id(noise, bits[j]);
    } else if (noise.kind == NoiseKind::kUniform) {
      for (int64_t j = 0; j < n; ++j) ids[i + j] = bucket_of(noise, bits[j]).index;
    } else {
      for (int64_t j = 0; j < n; ++j) ids[i + j] = draw(noise, bits[j]).id;
    }
    i += n;
  }
}

}  // namespace nce::NCE_SIMD_NAMESPACE
