// The row gradient: its binding, and its launch as csrc/cuda/row_grad.cu and row_grad_sums.cu do it.
#include <numeric>
#include <vector>

#include "arrays.h"
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

void number_pairs(uint32_t* pairs, int64_t n, const Launch& how) {
  launch_persistent(number_pairs_kernel, (n + kThreads - 1) / kThreads, kThreads, 0, how, pairs, n);
}

// In place of CUB: a stable sort by the bits that the library's sort looks at.
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

// layout: "exact" or "padded" for COO rows, "dense" for a row per class.
py::dict row_grad(const py::array& ids, const py::array& dlogit, const py::array& grad_loss, const py::array& hidden,
                  int64_t n_classes, const py::dtype& dtype, const std::string& layout, bool with_rows, bool with_bias,
                  int64_t tile_pairs, int64_t grid, int warps, int access, uint64_t order) {
  emulator::seed(order);
  const Launch how{grid, warps, access};
  const bool dense = layout == "dense";
  PairsOfArrays pairs(ids, dlogit, grad_loss, hidden, n_classes, tile_pairs, with_rows, dense, how);
  RowGradTiles& p = pairs.p;
  const int64_t n_rows = dense ? n_classes : layout == "padded" ? pairs.n_padded : pairs.n_segments;

  py::dict outputs;
  const auto output = [&](const char* name, const py::dtype& type, const Shape& shape) {
    py::array a = poisoned(type, shape);
    if (dense) std::memset(a.mutable_data(), 0, static_cast<size_t>(a.nbytes()));
    outputs[name] = a;
    return a.mutable_data();
  };
  if (!dense) p.segment_class = static_cast<int64_t*>(output("classes", py::dtype::of<int64_t>(), {n_rows}));
  if (with_rows) p.rows = output("rows", dtype, {n_rows, p.dim});
  if (with_bias) p.bias = output("bias", dtype, {n_rows});
  const Storage storage = storage_of("dtype", dtype);
  sum_segments(p, storage, pairs.hidden_storage, how);
  if (layout == "padded") clear_spare_rows(p, storage, n_rows, how);
  return outputs;
}

}  // namespace

PairsOfArrays::PairsOfArrays(const py::array& ids, const py::array& dlogit, const py::array& grad_loss,
                             const py::array& hidden, int64_t n_classes, int64_t tile_pairs, bool with_rows,
                             bool by_class, const Launch& how)
    : hidden_storage(storage_of("hidden", hidden.dtype())) {
  check(ids.ndim() == 2 && hidden.ndim() == 2, "ids and hidden must have two dimensions");
  const int64_t batch = ids.shape(0), columns = ids.shape(1), n = batch * columns;
  const py::dtype compute = dtype_of(compute_of(hidden_storage));
  const auto* unsorted = reinterpret_cast<const uint32_t*>(contiguous<int32_t>("ids", ids, {batch, columns}));
  check(hidden.shape(0) == batch, "hidden must have B rows");
  check_rows("hidden", hidden, hidden.shape(1));
  check(grad_loss.dtype().is(compute) && grad_loss.ndim() == 1 && grad_loss.shape(0) == batch, "grad_loss must be [B]");
  check(tile_pairs % kWarp == 0, "tile_pairs must be a multiple of a warp");

  p.dim = hidden.shape(1);
  p.n_pairs = n;
  p.tile_pairs = tile_pairs > 0 ? tile_pairs : tile_pairs_for(n);
  p.n_tiles = (n + p.tile_pairs - 1) / p.tile_pairs;
  p.examples = nce::examples_of(static_cast<uint64_t>(columns));
  p.dlogit = contiguous("dlogit", dlogit, compute, {batch, columns});
  p.grad_loss = grad_loss.data();
  p.grad_loss_stride = stride_of("grad_loss", grad_loss);
  p.hidden = hidden.data();
  p.hidden_stride = stride_of("hidden", hidden);
  p.by_class = by_class;
  n_padded = std::min(n, n_classes);
  const size_t n_words = static_cast<size_t>(n) * sizeof(uint32_t), n_partial = 2 * static_cast<size_t>(p.n_tiles);
  numbers = Scratch(n_words);
  classes = Scratch(n_words);
  pairs = Scratch(n_words);
  counts = Scratch(by_class ? 0 : (static_cast<size_t>(p.n_tiles) + 1) * sizeof(uint32_t));
  partial_rows = Scratch(with_rows ? n_partial * p.dim * compute.itemsize() : 0);
  partial_bias = Scratch(n_partial * compute.itemsize());
  p.classes = classes.as<uint32_t>();
  p.pairs = pairs.as<uint32_t>();
  p.partial_rows = partial_rows.as<void>();
  p.partial_bias = partial_bias.as<void>();
  if (n == 0) return;
  number_pairs(numbers.as<uint32_t>(), n, how);
  sort_pairs(unsorted, numbers.as<uint32_t>(), n, n_classes, classes.as<uint32_t>(), pairs.as<uint32_t>());
  if (by_class) return;
  auto* before = counts.as<uint32_t>();
  count_segments(p, before, how);
  std::exclusive_scan(before, before + p.n_tiles + 1, before, uint32_t{0});
  p.segments_before = before;
  n_segments = before[p.n_tiles];
}

void list_segments(const RowGradTiles& p, int64_t n_rows, const Launch& how) {
  const int n_warps = how.warps > 0 ? how.warps : kThreads / kWarp;
  launch_persistent(list_segments_kernel, (p.n_tiles + n_warps - 1) / n_warps, n_warps * kWarp, 0, how, p, n_rows);
}

void bind_row_grad(py::module_& m) {
  using py::arg;
  m.def("row_grad", &row_grad, arg("ids"), arg("dlogit"), arg("grad_loss"), arg("hidden"), arg("n_classes"),
        arg("dtype"), arg("layout"), py::kw_only(), arg("with_rows") = true, arg("with_bias") = true,
        arg("tile_pairs") = 0, arg("grid") = 0, arg("warps") = 0, arg("access") = -1, arg("order") = 0);
}

}  // namespace emulated
