// Sums the pairs of each segment into one gradient row. Pairs are added in ascending order and a row has one owner,
// so the result does not depend on threads and repeats bit for bit.
#pragma once

#include "../row_grad.h"
#include "sampled_loss_kernel.h"
#include "simd.h"

namespace nce::NCE_SIMD_NAMESPACE {

// pair / columns without a division: for 1 < columns < 2^32 and pair < 2^32 the upper half of
// pair * (floor((2^64 - 1) / columns) + 1) is exact.
struct ExampleOf {
  uint64_t columns, reciprocal;
  explicit ExampleOf(uint64_t n) : columns(n), reciprocal(n > 1 ? ~uint64_t{0} / n + 1 : 0) {}
  NCE_INLINE_LAMBDA inline int64_t operator()(uint64_t pair) const {
    if (columns == 1) return static_cast<int64_t>(pair);
    return static_cast<int64_t>((static_cast<unsigned __int128>(pair) * reciprocal) >> 64);
  }
};

// One block of kVecs vectors of a row, kept in registers over the whole segment.
template <int kVecs, class Hidden, class Real>
NCE_INLINE void sum_block(const RowGrad& p, const ExampleOf& example_of, int64_t first, int64_t last, int64_t d,
                          Vec<Real>* sums) {
  const Real* dlogit = static_cast<const Real*>(p.dlogit);
  const Real* grad_loss = static_cast<const Real*>(p.grad_loss);
  for (int v = 0; v < kVecs; ++v) sums[v] = Vec<Real>(Real(0));
  for (int64_t i = first; i < last; ++i) {
    const uint64_t pair = static_cast<uint32_t>(p.pairs[i]);
    const int64_t example = example_of(pair);
    const Vec<Real> c(dlogit[pair] * grad_loss[example * p.grad_loss_stride]);
    const Hidden* x = static_cast<const Hidden*>(p.hidden) + example * p.hidden_stride + d;
    for (int v = 0; v < kVecs; ++v) sums[v] = fma(c, load(x + v * kLanes), sums[v]);
  }
}

template <class Hidden, class Real>
NCE_INLINE Vec<Real> sum_tail(const RowGrad& p, const ExampleOf& example_of, int64_t first, int64_t last, int64_t d) {
  const Real* dlogit = static_cast<const Real*>(p.dlogit);
  const Real* grad_loss = static_cast<const Real*>(p.grad_loss);
  Vec<Real> total(Real(0));
  for (int64_t i = first; i < last; ++i) {
    const uint64_t pair = static_cast<uint32_t>(p.pairs[i]);
    const int64_t example = example_of(pair);
    const Vec<Real> c(dlogit[pair] * grad_loss[example * p.grad_loss_stride]);
    const Hidden* x = static_cast<const Hidden*>(p.hidden) + example * p.hidden_stride + d;
    total = fma(c, load_first(x, p.dim - d), total);
  }
  return total;
}

template <class Stored, class Real>
NCE_INLINE void write_block(Stored* out, const Vec<Real>& v, bool streamed) {
  if constexpr (sizeof(Stored) == 4) {
    if (streamed) return stream(out, v);
  }
  store(out, v);
}

template <class Stored, class Hidden, class Real>
NCE_INLINE void row_grad_segments(const RowGrad& p, int64_t begin, int64_t end) {
  constexpr int kBlock = 4;
  constexpr int64_t kAhead = 6;  // pairs; hidden rows of a segment lie anywhere in the batch
  const ExampleOf example_of(static_cast<uint64_t>(p.columns));
  const bool streamed = p.values && p.dim % kLanes == 0 && reinterpret_cast<uintptr_t>(p.values) % 64 == 0;
  const int64_t n_pairs = p.segment_start[end];
  int64_t fetched = p.segment_start[begin];
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = p.segment_start[s], last = p.segment_start[s + 1];
    for (const int64_t until = last + kAhead < n_pairs ? last + kAhead : n_pairs; fetched < until; ++fetched) {
      const uint64_t pair = static_cast<uint32_t>(p.pairs[fetched]);
      const Hidden* x = static_cast<const Hidden*>(p.hidden) + example_of(pair) * p.hidden_stride;
      for (int64_t d = 0; d < p.dim; d += 64 / sizeof(Hidden)) __builtin_prefetch(x + d);
      __builtin_prefetch(static_cast<const Real*>(p.dlogit) + pair);
    }
    const int64_t out_row = p.by_class ? static_cast<int64_t>(p.pairs[first] >> 32) : s;
    if (p.values) {
      Stored* out = static_cast<Stored*>(p.values) + out_row * p.dim;
      Vec<Real> sums[kBlock];
      int64_t d = 0;
      for (; d + kBlock * kLanes <= p.dim; d += kBlock * kLanes) {
        sum_block<kBlock, Hidden>(p, example_of, first, last, d, sums);
        for (int v = 0; v < kBlock; ++v) write_block(out + d + v * kLanes, sums[v], streamed);
      }
      for (; d + kLanes <= p.dim; d += kLanes) {
        sum_block<1, Hidden>(p, example_of, first, last, d, sums);
        write_block(out + d, sums[0], streamed);
      }
      if (d < p.dim) store_first(out + d, sum_tail<Hidden, Real>(p, example_of, first, last, d), p.dim - d);
    }
    if (p.bias) {
      const Real* dlogit = static_cast<const Real*>(p.dlogit);
      const Real* grad_loss = static_cast<const Real*>(p.grad_loss);
      Real total = Real(0);
      for (int64_t i = first; i < last; ++i) {
        const uint64_t pair = static_cast<uint32_t>(p.pairs[i]);
        total += dlogit[pair] * grad_loss[example_of(pair) * p.grad_loss_stride];
      }
      store_first(static_cast<Stored*>(p.bias) + out_row, Vec<Real>(total), 1);
    }
  }
}

template <class Stored, class Real>
static void row_grad(const RowGrad& p, int64_t begin, int64_t end) {
  if (begin == end) return;
  if constexpr (sizeof(Real) == sizeof(double)) {
    row_grad_segments<Stored, double, double>(p, begin, end);
  } else if (p.hidden_storage == Storage::kFloat) {
    row_grad_segments<Stored, float, float>(p, begin, end);
  } else if (p.hidden_storage == Storage::kBFloat16) {
    row_grad_segments<Stored, BFloat16, float>(p, begin, end);
  } else {
    row_grad_segments<Stored, Half, float>(p, begin, end);
  }
#if NCE_SIMD_LEVEL > 0
  _mm_sfence();  // streamed stores become visible before another thread is told that they are there
#endif
}

}  // namespace nce::NCE_SIMD_NAMESPACE
