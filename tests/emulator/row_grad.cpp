// The row gradient, launched as csrc/cuda/row_grad.cu and row_grad_sums.cu do; see kernels.h.
#include <numeric>
#include <vector>

#include "kernels.h"
#include "segments.cuh"

namespace emulated {
namespace {

using namespace nce::cuda;

constexpr int kThreads = 256;

template <class Stored, class Hidden>
void sums_of(const RowGradTiles& p, const Launch& how) {
  constexpr int64_t kSlice = kWarp * kPerVector<Hidden>;
  const int64_t n_slices = p.rows ? (p.dim + kSlice - 1) / kSlice : 1;
  const int64_t n_join_slices = p.rows ? (p.dim + kJoinSlice - 1) / kJoinSlice : 1;
  const int n_warps = how.warps > 0 ? how.warps : kThreads / kWarp;
  with_access<Hidden>(p.hidden, p.hidden_stride, p.dim, how, [&](auto access) {
    launch_persistent(segment_sums_kernel<Stored, Hidden, decltype(access)::value>,
                      (p.n_tiles * n_slices + n_warps - 1) / n_warps, n_warps * kWarp, 0, how, p,
                      static_cast<int>(n_slices));
  });
  launch_persistent(join_segments_kernel<Stored>, (p.n_tiles * n_join_slices + kJoinWarps - 1) / kJoinWarps,
                    kJoinWarps * kWarp, join_shared_bytes<Stored>(), how, p, static_cast<int>(n_join_slices));
}

}  // namespace

void number_pairs(uint32_t* pairs, int64_t n, const Launch& how) {
  launch_persistent(number_pairs_kernel, (n + kThreads - 1) / kThreads, kThreads, 0, how, pairs, n);
}

void sort_pairs(const uint32_t* ids, const uint32_t* numbers, int64_t n, int64_t n_classes, uint32_t* classes,
                uint32_t* pairs) {
  const auto mask = static_cast<uint32_t>((uint64_t{1} << sorted_bits(n_classes)) - 1);
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return (ids[a] & mask) < (ids[b] & mask); });
  for (int64_t i = 0; i < n; ++i) {
    classes[i] = ids[order[i]];
    pairs[i] = numbers[order[i]];
  }
}

void count_segments(const RowGradTiles& p, uint32_t* counts, const Launch& how) {
  const int n_warps = how.warps > 0 ? how.warps : kThreads / kWarp;
  launch_persistent(count_segments_kernel, p.n_tiles / n_warps + 1, n_warps * kWarp, 0, how, p, counts);
}

void sum_segments(const RowGradTiles& p, Storage storage, Storage hidden_storage, const Launch& how) {
  if (p.n_pairs == 0) return;
  with_stored(storage, [&](auto stored) {
    with_stored(hidden_storage, [&](auto hidden) {
      if constexpr ((sizeof(stored) == 8) == (sizeof(hidden) == 8)) {
        sums_of<decltype(stored), decltype(hidden)>(p, how);
      } else {
        throw std::invalid_argument("the gradient and hidden must both be float64 or neither");
      }
    });
  });
}

void clear_spare_rows(const RowGradTiles& p, Storage storage, int64_t n_rows, const Launch& how) {
  if (n_rows == 0) return;
  with_stored(storage, [&](auto stored) {
    using Stored = decltype(stored);
    launch_persistent(clear_spare_rows_kernel<Stored>, (n_rows * p.dim + kThreads - 1) / kThreads, kThreads, 0, how,
                      p.segments_before + p.n_tiles, n_rows, p.dim, p.segment_class, static_cast<Stored*>(p.rows),
                      static_cast<Stored*>(p.bias));
  });
}

}  // namespace emulated
