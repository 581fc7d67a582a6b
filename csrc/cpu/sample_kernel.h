// Draws noise in blocks of 16: eight Philox counters side by side.
#pragma once

#include "../noise.h"
#include "../philox.h"
#include "simd.h"

namespace nce::NCE_SIMD_NAMESPACE {

// Products of the lower halves of 64-bit lanes.
template <class Part>
NCE_INLINE Part multiply_words(Part a, Part b) {
#if NCE_SIMD_LEVEL == 2
  return reinterpret_cast<Part>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif NCE_SIMD_LEVEL == 1
  return reinterpret_cast<Part>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// out[2 i] = even[i], out[2 i + 1] = odd[i]
template <class Part>
NCE_INLINE void interleave(Part even, Part odd, uint64_t* out) {
#if NCE_SIMD_LEVEL == 2
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const __m512i a = reinterpret_cast<__m512i>(even), b = reinterpret_cast<__m512i>(odd);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, low, b));
  _mm512_storeu_si512(out + 8, _mm512_permutex2var_epi64(a, high, b));
#else
  for (size_t i = 0; i < sizeof(Part) / 8; ++i) {
    out[2 * i] = even[i];
    out[2 * i + 1] = odd[i];
  }
#endif
}

NCE_INLINE uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }

constexpr int kPairs = kLanes / 2;  // one Philox call gives the two draws of a pair of slots

// Philox4x32-10 of counters (pair[i], example[i], nonce); each 32-bit word sits in a 64-bit lane whose upper half may
// hold anything, since multiplication looks at the lower halves only. bits[2 i] and bits[2 i + 1] are the draws of
// slots 2 pair[i] and the one after.
NCE_INLINE void draw_block(Seed seed, const uint64_t* example, const uint64_t* pair, uint64_t* bits) {
  constexpr int kPartLanes = kNativeBytes / 8;
  using Part = Native<uint64_t, kPartLanes>::type;
  for (int first = 0; first < kPairs; first += kPartLanes) {
    Part c0, c1;
    std::memcpy(&c0, pair + first, sizeof(Part));
    std::memcpy(&c1, example + first, sizeof(Part));
    Part c2 = Part{} + (seed.nonce & 0xFFFFFFFFu), c3 = Part{} + (seed.nonce >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed.key), k1 = static_cast<uint32_t>(seed.key >> 32);
    for (int round = 0; round < 10; ++round) {
      const Part product0 = multiply_words(c0, Part{} + kPhiloxMultiplier0);
      const Part product1 = multiply_words(c2, Part{} + kPhiloxMultiplier1);
      c0 = (product1 >> 32) ^ c1 ^ (Part{} + k0);
      c2 = (product0 >> 32) ^ c3 ^ (Part{} + k1);
      c1 = product1;
      c3 = product0;
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    const Part even = (c1 << 32) | (c0 & 0xFFFFFFFFu), odd = (c3 << 32) | (c2 & 0xFFFFFFFFu);
    interleave(even, odd, bits + 2 * first);
  }
}

// The draws of successive examples. The pairs of slots of all examples, one after another, are cut into blocks of 8,
// so that few negatives an example waste no lane. The block after the one asked for is already there, and its alias
// entries are on their way from memory.
struct DrawStream {
  Noise noise;
  Seed seed;
  int64_t n_slots;                      // of an example
  int64_t n_pairs = (n_slots + 1) / 2;  // of an example

  struct Block {
    int64_t index = -1;
    uint64_t bits[kLanes];
  };
  Block blocks[2] = {};
  int current = 0;
  int64_t next_index = -1, next_example = 0, next_pair = 0;  // the first pair of block next_index

  NCE_INLINE_LAMBDA inline void fill(Block& block, int64_t index) {
    if (index != next_index) {
      next_example = index * kPairs / n_pairs;
      next_pair = index * kPairs % n_pairs;
    }
    uint64_t example[kPairs], pair[kPairs];
    for (int i = 0; i < kPairs; ++i) {
      example[i] = static_cast<uint64_t>(next_example);
      pair[i] = static_cast<uint64_t>(next_pair);
      const bool last = ++next_pair == n_pairs;
      next_example += last;
      next_pair = last ? 0 : next_pair;
    }
    next_index = index + 1;
    block.index = index;
    draw_block(seed, example, pair, block.bits);
    if (noise.kind != NoiseKind::kAlias) return;
    for (const uint64_t bits : block.bits) __builtin_prefetch(noise.table + bucket_of(noise, bits).index);
  }

  struct Run {
    const uint64_t* bits;
    int64_t count;
  };

  // The draws of slots slot, slot + 1, ... of the example, as far as they lie in one block.
  NCE_INLINE_LAMBDA inline Run from(int64_t example, int64_t slot) {
    const int64_t position = 2 * example * n_pairs + slot, index = position / kLanes, offset = position % kLanes;
    if (blocks[current].index != index) {
      current ^= 1;
      if (blocks[current].index != index) fill(blocks[current], index);
      fill(blocks[current ^ 1], index + 1);
    }
    const int64_t in_block = kLanes - offset, left = n_slots - slot;
    return Run{blocks[current].bits + offset, in_block < left ? in_block : left};
  }
};

// False if an alias of the table is out of range.
static bool sample(const Noise& noise, Seed seed, int64_t columns, int64_t begin, int64_t end, int64_t* ids) {
  DrawStream stream{noise, seed, columns};
  constexpr int64_t kLook = 1024;
  const int64_t last = noise.n_classes - 1;
  int64_t looked = begin, signs = 0;  // negative if an id is, or is above the last
  for (int64_t i = begin; i < end;) {
    const DrawStream::Run run = stream.from(i / columns, i % columns);
    const int64_t n = run.count < end - i ? run.count : end - i;
    const uint64_t* bits = run.bits;
    if (noise.kind == NoiseKind::kLogUniform) {
      for (int64_t j = 0; j < n; ++j) ids[i + j] = log_uniform_id(noise, bits[j]);
    } else if (noise.kind == NoiseKind::kUniform) {
      for (int64_t j = 0; j < n; ++j) ids[i + j] = bucket_of(noise, bits[j]).index;
    } else {
      for (int64_t j = 0; j < n; ++j) ids[i + j] = draw(noise, bits[j]).id;
    }
    i += n;
    // Ids are looked at in long runs, while they are in the nearest cache.
    if (noise.kind == NoiseKind::kAlias && (i - looked >= kLook || i == end)) {
      for (; looked < i; ++looked) signs |= ids[looked] | (last - ids[looked]);
    }
  }
  return signs >= 0;
}

}  // namespace nce::NCE_SIMD_NAMESPACE
