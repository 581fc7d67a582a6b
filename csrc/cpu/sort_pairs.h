// Stable parallel radix sort of (class, pair) keys. Torch-free: the caller brings the parallel loop.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace nce {

struct SortedPairs {
  std::unique_ptr<uint64_t[]> keys;  // class << 32 | pair, ascending
  int64_t count = 0;
};

// Pairs with a negative class are left out. Stability makes the order unique, so it does not depend on n_threads.
// parallel(n, f) calls f(0) .. f(n - 1), each exactly once, possibly at the same time.
template <class Parallel>
SortedPairs sort_pairs(const int32_t* classes, int64_t n, int64_t n_classes, int64_t n_threads, Parallel&& parallel) {
  constexpr int kMaxDigitBits = 11;  // 2048 counters of 4 bytes stay in the first-level cache
  int bits = 1;
  while (bits < 31 && (int64_t{1} << bits) < n_classes) ++bits;
  const int passes = (bits + kMaxDigitBits - 1) / kMaxDigitBits;
  const int digit_bits = (bits + passes - 1) / passes;
  const int64_t radix = int64_t{1} << digit_bits;

  SortedPairs result{std::unique_ptr<uint64_t[]>(new uint64_t[n]), n};
  std::unique_ptr<uint64_t[]> other(passes > 1 ? new uint64_t[n] : nullptr);
  std::vector<int64_t> position(n_threads * radix);
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * digit_bits;
    // The first pass reads classes and makes keys of them; the later ones read what the one before has written.
    const auto for_each_key = [&](int64_t thread, auto&& use) {
      const int64_t count = pass == 0 ? n : result.count;
      const int64_t begin = count * thread / n_threads, end = count * (thread + 1) / n_threads;
      if (pass == 0) {
        for (int64_t i = begin; i < end; ++i) {
          if (classes[i] >= 0) use(static_cast<uint64_t>(classes[i]) << 32 | static_cast<uint64_t>(i));
        }
      } else {
        for (int64_t i = begin; i < end; ++i) use(result.keys[i]);
      }
    };
    const auto digit = [&](uint64_t key) { return static_cast<int64_t>((key >> (32 + shift)) & (radix - 1)); };

    parallel(n_threads, [&](int64_t thread) {
      int64_t* counts = position.data() + thread * radix;
      std::fill(counts, counts + radix, 0);
      for_each_key(thread, [&](uint64_t key) { ++counts[digit(key)]; });
    });
    int64_t total = 0;
    for (int64_t d = 0; d < radix; ++d) {
      for (int64_t thread = 0; thread < n_threads; ++thread) {
        total += std::exchange(position[thread * radix + d], total);
      }
    }
    uint64_t* out = pass == 0 ? result.keys.get() : other.get();
    parallel(n_threads, [&](int64_t thread) {
      int64_t* next = position.data() + thread * radix;
      for_each_key(thread, [&](uint64_t key) { out[next[digit(key)]++] = key; });
    });
    result.count = total;
    if (pass > 0) std::swap(result.keys, other);
  }
  return result;
}

// Starts of the runs of equal class, and one past the last: [n_segments + 1].
template <class Parallel>
std::vector<int64_t> segment_starts(const SortedPairs& pairs, int64_t n_threads, Parallel&& parallel) {
  const uint64_t* keys = pairs.keys.get();
  const auto is_start = [&](int64_t i) { return i == 0 || (keys[i] >> 32) != (keys[i - 1] >> 32); };
  const auto bound = [&](int64_t thread) { return pairs.count * thread / n_threads; };
  std::vector<int64_t> first(n_threads + 1, 0);
  parallel(n_threads, [&](int64_t thread) {
    int64_t count = 0;
    for (int64_t i = bound(thread); i < bound(thread + 1); ++i) count += is_start(i);
    first[thread + 1] = count;
  });
  for (int64_t thread = 0; thread < n_threads; ++thread) first[thread + 1] += first[thread];
  std::vector<int64_t> starts(first[n_threads] + 1);
  parallel(n_threads, [&](int64_t thread) {
    int64_t segment = first[thread];
    for (int64_t i = bound(thread); i < bound(thread + 1); ++i) {
      if (is_start(i)) starts[segment++] = i;
    }
  });
  starts.back() = pairs.count;
  return starts;
}

}  // namespace nce
