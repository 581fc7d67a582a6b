// Draws noise in blocks of 16 slots: eight Philox counters side by side.
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

// Philox4x32-10 of counters (first_pair + i, example, nonce), i < 8; each 32-bit word sits in a 64-bit lane whose
// upper half may hold anything, since multiplication looks at the lower halves only. bits[2 i] and bits[2 i + 1]
// are the draws of slots 2 (first_pair + i) and the one after.
NCE_INLINE void draw_block(Seed seed, uint32_t example, uint32_t first_pair, uint64_t* bits) {
  constexpr int kPartLanes = kNativeBytes / 8, kParts = 8 / kPartLanes;
  using Part = Native<uint64_t, kPartLanes>::type;
  for (int part = 0; part < kParts; ++part) {
    Part c0 = Part{} + first_pair, c1 = Part{} + example;
    for (int i = 0; i < kPartLanes; ++i) c0[i] += static_cast<uint64_t>(part * kPartLanes + i);
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
    for (int i = 0; i < kPartLanes; ++i) {
      bits[2 * (part * kPartLanes + i)] = even[i];
      bits[2 * (part * kPartLanes + i) + 1] = odd[i];
    }
  }
}

// The draws of successive examples, block by block. The block after the one asked for is already there, and its
// alias entries are on their way from memory.
struct DrawStream {
  const Noise& noise;
  Seed seed;
  int64_t n_slots;  // of an example

  struct Block {
    int64_t example = -1, first = 0;  // first slot, a multiple of kLanes
    uint64_t bits[kLanes];
  };
  Block blocks[2] = {};
  int current = 0;

  NCE_INLINE_LAMBDA inline void fill(Block& block, int64_t example, int64_t first) const {
    block.example = example;
    block.first = first;
    draw_block(seed, static_cast<uint32_t>(example), static_cast<uint32_t>(first / 2), block.bits);
    if (noise.kind != NoiseKind::kAlias) return;
    const int64_t n = n_slots - first < kLanes ? n_slots - first : kLanes;
    for (int64_t i = 0; i < n; ++i) __builtin_prefetch(noise.table + bucket_of(noise, block.bits[i]).index);
  }

  // bits[i] = the draw of slot first + i of the example.
  inline const uint64_t* block(int64_t example, int64_t first) {
    if (blocks[current].example != example || blocks[current].first != first) {
      current ^= 1;
      Block& found = blocks[current];
      if (found.example != example || found.first != first) fill(found, example, first);
      const bool more = first + kLanes < n_slots;
      fill(blocks[current ^ 1], more ? example : example + 1, more ? first + kLanes : 0);
    }
    return blocks[current].bits;
  }
};

static void sample(const Noise& noise, Seed seed, int64_t columns, int64_t begin, int64_t end, int64_t* ids) {
  DrawStream stream{noise, seed, columns};
  for (int64_t i = begin; i < end;) {
    const int64_t example = i / columns, slot = i % columns, first = slot / kLanes * kLanes;
    const int64_t left = columns - slot < end - i ? columns - slot : end - i;
    const int64_t n = first + kLanes - slot < left ? first + kLanes - slot : left;
    const uint64_t* bits = stream.block(example, first) + (slot - first);
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
