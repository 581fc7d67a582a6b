// Launches of the row gradient's kernels; see row_grad_launch.cuh.
#include "row_grad_launch.cuh"

namespace nce::cuda {
namespace {

template <class Stored, class Hidden, Access kAccess>
void launch_sums(const RowGradTiles& p, const OnDevice& device) {
  constexpr int kThreads = 256;
  constexpr int64_t kSlice = kWarp * kPerVector<Hidden>;
  const int64_t n_slices = p.rows ? (p.dim + kSlice - 1) / kSlice : 1;
  const int64_t n_join_slices = p.rows ? (p.dim + kJoinSlice - 1) / kJoinSlice : 1;
  static Occupancy summing, joining;
  launch_persistent(segment_sums_kernel<Stored, Hidden, kAccess>,
                    (p.n_tiles * n_slices + kThreads / kWarp - 1) / (kThreads / kWarp), kThreads, 0, device, summing, p,
                    static_cast<int>(n_slices));
  launch_persistent(join_segments_kernel<Stored>, (p.n_tiles * n_join_slices + kJoinWarps - 1) / kJoinWarps,
                    kJoinWarps * kWarp, join_shared_bytes<Stored>(), device, joining, p,
                    static_cast<int>(n_join_slices));
}

template <class Stored, class Hidden>
void sums_of(const RowGradTiles& p, const OnDevice& device) {
  if constexpr ((sizeof(Stored) == 8) != (sizeof(Hidden) == 8)) {
    return;  // refused before
  } else {
    const int64_t size = sizeof(Hidden);
    with_access<Hidden>(access_of(p.hidden, p.hidden_stride * size, p.dim * size),
                        [&](auto access) { launch_sums<Stored, Hidden, decltype(access)::value>(p, device); });
  }
}

}  // namespace

void sum_segments(const RowGradTiles& p, const RowGradCall& call, const OnDevice& device) {
  if (p.n_pairs == 0) return;
  with_stored(call.storage, [&](auto stored) {
    with_stored(call.hidden_storage, [&](auto hidden) { sums_of<decltype(stored), decltype(hidden)>(p, device); });
  });
}

void clear_spare_rows(const RowGradTiles& p, Storage storage, int64_t n_rows, const OnDevice& device) {
  if (n_rows == 0) return;
  with_stored(storage, [&](auto stored) {
    using Stored = decltype(stored);
    constexpr int kThreads = 256;
    static Occupancy clearing;
    launch_persistent(clear_spare_rows_kernel<Stored>, (n_rows * p.dim + kThreads - 1) / kThreads, kThreads, 0, device,
                      clearing, p.segments_before + p.n_tiles, n_rows, p.dim, p.segment_class,
                      static_cast<Stored*>(p.rows), static_cast<Stored*>(p.bias));
  });
}

}  // namespace nce::cuda
