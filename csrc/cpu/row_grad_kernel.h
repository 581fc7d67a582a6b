// Sums the pairs of each segment into one gradient row. Pairs are added in ascending order and a row has one owner,
// so the result does not depend on threads and repeats bit for bit.
#pragma once

#include "../row_grad.h"
#include "sampled_loss_kernel.h"
#include "simd.h"

namespace nce::NCE_SIMD_NAMESPACE {

// Pairs of one segment that are summed before they join the rest: bounds the rounding error of a hot row, whose pairs
// may count in the millions, and what is fetched ahead.
constexpr int kChunk = 64;

template <class Hidden, class Real>
struct Chunk {
  int count = 0;
  Real coefficient[kChunk];
  const Hidden* row[kChunk];
};

template <class Hidden, class Real>
NCE_INLINE void read_chunk(const RowGrad& p, const ExampleOf& examples, int64_t first, int64_t last,
                           Chunk<Hidden, Real>& chunk) {
  chunk.count = static_cast<int>(last - first);
  for (int i = 0; i < chunk.count; ++i) {
    const uint64_t pair = static_cast<uint32_t>(p.pairs[first + i]);
    const int64_t example = example_of(examples, pair);
    const Real grad_loss = static_cast<const Real*>(p.grad_loss)[example * p.grad_loss_stride];
    chunk.coefficient[i] = static_cast<const Real*>(p.dlogit)[pair] * grad_loss;
    chunk.row[i] = static_cast<const Hidden*>(p.hidden) + example * p.hidden_stride;
  }
}

// Elements d .. d + 16 kVecs - 1 of the chunk's sum, held in registers over all its pairs.
template <int kVecs, class Hidden, class Real>
NCE_INLINE void sum_block(const Chunk<Hidden, Real>& chunk, int64_t d, Vec<Real>* sums) {
  unroll<kVecs>([&](auto v) NCE_INLINE_LAMBDA { sums[v] = Vec<Real>(Real(0)); });
  for (int i = 0; i < chunk.count; ++i) {
    const Vec<Real> c(chunk.coefficient[i]);
    const Hidden* x = chunk.row[i] + d;
    unroll<kVecs>([&](auto v) NCE_INLINE_LAMBDA { sums[v] = fma(c, load(x + v * kLanes), sums[v]); });
  }
}

template <class Hidden, class Real>
NCE_INLINE Vec<Real> sum_tail(const Chunk<Hidden, Real>& chunk, int64_t d, int64_t n) {
  Vec<Real> total(Real(0));
  for (int i = 0; i < chunk.count; ++i) {
    total = fma(Vec<Real>(chunk.coefficient[i]), load_first(chunk.row[i] + d, n), total);
  }
  return total;
}

// Where the sum of a chunk goes: to the gradient row if it is the segment's last, else to `partial`.
template <class Stored, class Real>
struct Output {
  Stored* row;
  Real* partial;
  bool first, last, streamed;

  NCE_INLINE_LAMBDA inline Vec<Real> joined(int64_t d, const Vec<Real>& sums) const {
    return first ? sums : load(partial + d) + sums;
  }
  NCE_INLINE_LAMBDA inline void put(int64_t d, const Vec<Real>& sums) const {
    const Vec<Real> total = joined(d, sums);
    if (!last) return store(partial + d, total);
    if constexpr (sizeof(Stored) == 4) {
      if (streamed) return stream(row + d, total);
    }
    store(row + d, total);
  }
  NCE_INLINE_LAMBDA inline void put_first(int64_t d, const Vec<Real>& sums, int64_t n) const {
    const Vec<Real> total = joined(d, sums);
    if (last) return store_first(row + d, total, n);
    store(partial + d, total);
  }
};

template <class Stored, class Hidden, class Real>
NCE_INLINE void sum_rows(const Chunk<Hidden, Real>& chunk, int64_t dim, const Output<Stored, Real>& out) {
  constexpr int kBlock = 4;
  Vec<Real> sums[kBlock];
  int64_t d = 0;
  for (; d + kBlock * kLanes <= dim; d += kBlock * kLanes) {
    sum_block<kBlock>(chunk, d, sums);
    unroll<kBlock>([&](auto v) NCE_INLINE_LAMBDA { out.put(d + v * kLanes, sums[v]); });
  }
  for (; d + kLanes <= dim; d += kLanes) {
    sum_block<1>(chunk, d, sums);
    out.put(d, sums[0]);
  }
  if (d < dim) out.put_first(d, sum_tail(chunk, d, dim - d), dim - d);
}

// Sums the segments begin .. end - 1 and hands each to the sink: sink.ahead(s) before its turn, where the sum is to be
// written by sink.row(s, class) or null, whether past the caches by sink.streamed(), and then sink.finish(s, class,
// sum of the coefficients).
template <class Summed, class Hidden, class Real, class Sink>
NCE_INLINE void for_each_segment(const RowGrad& p, int64_t begin, int64_t end, Real* partial, const Sink& sink) {
  constexpr int64_t kAhead = 6;  // pairs; hidden rows of a segment lie anywhere in the batch
  const ExampleOf examples = examples_of(static_cast<uint64_t>(p.columns));
  const int64_t n_pairs = p.segment_start[end];
  int64_t fetched = p.segment_start[begin];
  Chunk<Hidden, Real> chunk;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = p.segment_start[s], last = p.segment_start[s + 1];
    const auto segment_class = static_cast<int64_t>(p.pairs[first] >> 32);
    sink.ahead(s);
    Summed* row = sink.row(s, segment_class);
    Real bias = Real(0);
    for (int64_t chunk_begin = first; chunk_begin < last; chunk_begin += kChunk) {
      const int64_t chunk_end = chunk_begin + kChunk < last ? chunk_begin + kChunk : last;
      for (const int64_t until = chunk_end + kAhead < n_pairs ? chunk_end + kAhead : n_pairs; fetched < until;
           ++fetched) {
        const uint64_t pair = static_cast<uint32_t>(p.pairs[fetched]);
        const Hidden* x = static_cast<const Hidden*>(p.hidden) + example_of(examples, pair) * p.hidden_stride;
        for (int64_t d = 0; d < p.dim; d += 64 / sizeof(Hidden)) __builtin_prefetch(x + d);
        __builtin_prefetch(static_cast<const Real*>(p.dlogit) + pair);
      }
      read_chunk(p, examples, chunk_begin, chunk_end, chunk);
      if (row) {
        sum_rows(chunk, p.dim,
                 Output<Summed, Real>{row, partial, chunk_begin == first, chunk_end == last, sink.streamed()});
      }
      Real sum = Real(0);
      for (int i = 0; i < chunk.count; ++i) sum += chunk.coefficient[i];
      bias += sum;
    }
    sink.finish(s, segment_class, bias);
  }
}

// Segments become rows and elements of a gradient.
template <class Stored, class Real>
struct GradientSink {
  const RowGrad& p;
  bool past_caches;

  NCE_INLINE_LAMBDA inline int64_t place(int64_t s, int64_t segment_class) const {
    return p.by_class ? segment_class : s;
  }
  NCE_INLINE_LAMBDA inline void ahead(int64_t) const {}
  NCE_INLINE_LAMBDA inline Stored* row(int64_t s, int64_t segment_class) const {
    return p.values ? static_cast<Stored*>(p.values) + place(s, segment_class) * p.dim : nullptr;
  }
  NCE_INLINE_LAMBDA inline bool streamed() const { return past_caches; }
  NCE_INLINE_LAMBDA inline void finish(int64_t s, int64_t segment_class, Real bias) const {
    if (p.bias) store_first(static_cast<Stored*>(p.bias) + place(s, segment_class), Vec<Real>(bias), 1);
  }
};

template <class Stored, class Hidden, class Real>
NCE_INLINE void row_grad_segments(const RowGrad& p, int64_t begin, int64_t end, Real* partial) {
  const bool aligned = p.dim % kLanes == 0 && reinterpret_cast<uintptr_t>(p.values) % 64 == 0;
  const GradientSink<Stored, Real> sink{p, aligned};
  for_each_segment<Stored, Hidden>(p, begin, end, partial, sink);
}

// Calls f(a null pointer to hidden's type).
template <class Real, class F>
NCE_INLINE void with_hidden_type(Storage storage, const F& f) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    f(static_cast<const double*>(nullptr));
  } else if (storage == Storage::kFloat) {
    f(static_cast<const float*>(nullptr));
  } else if (storage == Storage::kBFloat16) {
    f(static_cast<const BFloat16*>(nullptr));
  } else {
    f(static_cast<const Half*>(nullptr));
  }
}

template <class Stored, class Real>
static void row_grad(const RowGrad& p, int64_t begin, int64_t end, void* scratch) {
  if (begin == end) return;
  with_hidden_type<Real>(p.hidden_storage, [&]<class Hidden>(const Hidden*) NCE_INLINE_LAMBDA {
    row_grad_segments<Stored, Hidden>(p, begin, end, static_cast<Real*>(scratch));
  });
#if NCE_SIMD_LEVEL > 0
  _mm_sfence();  // streamed stores become visible before another thread is told that they are there
#endif
}

}  // namespace nce::NCE_SIMD_NAMESPACE
