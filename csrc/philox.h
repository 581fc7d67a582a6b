// Stateless random bits: Philox4x32-10 (Salmon et al., SC 2011), a pure function of (seed, example, slot).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace nce {

struct Seed {
  uint64_t key;    // seed[0]
  uint64_t nonce;  // seed[1], the upper half of the counter
};

NCE_HD Seed read_seed(const int64_t* words, int64_t stride) {
  if (words == nullptr) return Seed{0, 0};
  return Seed{static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[stride])};
}

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

struct Words {
  uint32_t w[4];
};

NCE_HD uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

NCE_HD Words philox4x32_10(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(kPhiloxMultiplier0, c.w[0]), low0 = kPhiloxMultiplier0 * c.w[0];
    const uint32_t high1 = high_product(kPhiloxMultiplier1, c.w[2]), low1 = kPhiloxMultiplier1 * c.w[2];
    c = Words{{high1 ^ c.w[1] ^ k0, low1, high0 ^ c.w[3] ^ k1, low0}};
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return c;
}

// The four words that serve slots 2 * pair and 2 * pair + 1 of an example.
NCE_HD Words random_words(Seed seed, uint32_t example, uint32_t pair) {
  const Words counter{{pair, example, static_cast<uint32_t>(seed.nonce), static_cast<uint32_t>(seed.nonce >> 32)}};
  return philox4x32_10(counter, static_cast<uint32_t>(seed.key), static_cast<uint32_t>(seed.key >> 32));
}

// The 64-bit draw of one slot: words 0 and 1 for an even slot, 2 and 3 for an odd one. Chosen, not indexed: an index
// known only at run time would push the words out of registers on a GPU.
NCE_HD uint64_t draw_bits(const Words& words, int64_t slot) {
  const uint64_t even = (static_cast<uint64_t>(words.w[1]) << 32) | words.w[0];
  const uint64_t odd = (static_cast<uint64_t>(words.w[3]) << 32) | words.w[2];
  return slot & 1 ? odd : even;
}

}  // namespace nce
