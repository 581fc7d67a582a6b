// Rows of the table: fetched ahead, multiplied with a vector, added up.
#pragma once

#include "../sampled_loss.h"
#include "kernels.h"
#include "simd.h"

namespace nce::NCE_SIMD_NAMESPACE {

// Asks for 16 elements of a row from `row` on. The rows of the next tile are asked for between the arithmetic on this
// one: a burst would fill the queue of outstanding misses first and leave it empty afterwards. Streamed rows leave no
// copy in the outer caches.
template <class Stored>
NCE_INLINE void prefetch_lanes(const Stored* row, bool stream) {
  constexpr int kLine = 64;
  for (int byte = 0; byte < kLanes * static_cast<int>(sizeof(Stored)); byte += kLine) {
    if (stream) {
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 0);
    } else {
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
    }
  }
}

template <class Stored>
NCE_INLINE void prefetch_row(const Stored* row, int64_t dim, bool stream) {
  for (int64_t d = 0; d < dim; d += kLanes) prefetch_lanes(row + d, stream);
}

// A row of storage as `padded_dim` compute values, zero beyond dim.
template <class Stored, class Real>
NCE_INLINE void widen(const Stored* row, int64_t dim, Real* out) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(row + d));
  if (d < dim) store(out + d, load_first(row + d, dim - d));
}

template <class Real>
NCE_INLINE void widen_hidden(const void* hidden, int64_t offset, Storage storage, int64_t dim, Real* out) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    widen(static_cast<const double*>(hidden) + offset, dim, out);
  } else if (storage == Storage::kFloat) {
    widen(static_cast<const float*>(hidden) + offset, dim, out);
  } else if (storage == Storage::kBFloat16) {
    widen(static_cast<const BFloat16*>(hidden) + offset, dim, out);
  } else {
    widen(static_cast<const Half*>(hidden) + offset, dim, out);
  }
}

// z[r] = <x, row[r]> for kRows rows at once, so that x is loaded once for all of them. As many rows of the next tile
// are asked for meanwhile.
template <int kRows, class Stored, class Real>
NCE_INLINE void dot_rows(const Stored* const* row, const Stored* const* next, const Real* x, int64_t dim, bool stream,
                         Real* z) {
  Vec<Real> sums[kRows];
  unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { sums[r] = Vec<Real>(Real(0)); });
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const Vec<Real> xs = load(x + d);
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { sums[r] = fma(load(row[r] + d), xs, sums[r]); });
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { prefetch_lanes(next[r] + d, stream); });
  }
  if (d < dim) {
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { __builtin_prefetch(next[r] + dim - 1); });
    const Vec<Real> xs = load(x + d);
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { sums[r] = fma(load_first(row[r] + d, dim - d), xs, sums[r]); });
  }
  unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { z[r] = sum(sums[r]); });
}

// gradient += sum_r coefficient[r] * row[r]
template <int kRows, class Stored, class Real>
NCE_INLINE void add_rows(const Stored* const* row, const Real* coefficient, int64_t dim, Real* gradient) {
  Vec<Real> c[kRows];
  unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { c[r] = Vec<Real>(coefficient[r]); });
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Vec<Real> g = load(gradient + d);
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { g = fma(c[r], load(row[r] + d), g); });
    store(gradient + d, g);
  }
  if (d < dim) {
    Vec<Real> g = load(gradient + d);
    unroll<kRows>([&](auto r) NCE_INLINE_LAMBDA { g = fma(c[r], load_first(row[r] + d, dim - d), g); });
    store(gradient + d, g);
  }
}

}  // namespace nce::NCE_SIMD_NAMESPACE
