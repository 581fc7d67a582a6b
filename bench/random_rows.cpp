// Reads whole rows of a float table at given ids, in the order given, as fast as it can: the speed limit of any
// program that needs these rows. The sum over all of them is returned so that no read can be left out.

#include <cstdint>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kLine = 16;  // floats in a cache line
constexpr int kSums = 4;       // hides the latency of an addition

// Rows start at any multiple of four bytes.
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

struct Sums {
  Lanes lanes[kSums] = {};
  float rest = 0;
};

// Reads `row` and asks for the same stretch of `next`, so that requests to memory never pause.
template <int kLocality>
inline void add_row(Sums& sums, const float* __restrict__ row, const float* __restrict__ next, int64_t dim) {
  constexpr int64_t kStep = kSums * kLanes;
  int64_t d = 0;
  for (; d + kStep <= dim; d += kStep) {
    for (int64_t line = 0; line < kStep; line += kLine) __builtin_prefetch(next + d + line, 0, kLocality);
    for (int i = 0; i < kSums; ++i) sums.lanes[i] += *reinterpret_cast<const Lanes*>(row + d + i * kLanes);
  }
  for (int64_t line = d; line < dim; line += kLine) __builtin_prefetch(next + line, 0, kLocality);
  __builtin_prefetch(next + dim - 1, 0, kLocality);
  for (; d + kLanes <= dim; d += kLanes) sums.lanes[0] += *reinterpret_cast<const Lanes*>(row + d);
  for (; d < dim; ++d) sums.rest += row[d];
}

template <int kLocality>
float sum_rows(const float* table, int64_t dim, const int64_t* ids, int64_t count, int64_t ahead, int threads) {
  float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    Sums sums;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; ++i) {
      const int64_t later = i + ahead < count ? i + ahead : i;
      add_row<kLocality>(sums, table + ids[i] * dim, table + ids[later] * dim, dim);
    }
    for (const Lanes& lanes : sums.lanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) sums.rest += lanes[lane];
    }
    total += sums.rest;
  }
  return total;
}

}  // namespace

// `locality` is the compiler's: 3 fetches into the first-level cache, 2 into the second, 0 past the outer ones.
extern "C" float sum_random_rows(const float* table, int64_t dim, const int64_t* ids, int64_t count, int64_t ahead,
                                 int locality, int threads) {
  switch (locality) {
    case 0:
      return sum_rows<0>(table, dim, ids, count, ahead, threads);
    case 2:
      return sum_rows<2>(table, dim, ids, count, ahead, threads);
    default:
      return sum_rows<3>(table, dim, ids, count, ahead, threads);
  }
}
