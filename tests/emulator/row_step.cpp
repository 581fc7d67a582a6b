// The optimizers' steps: their bindings, and their launches as csrc/cuda/row_step.cu and row_grad_step.cu do them.
#include "arrays.h"
#include "row_grad_step.cuh"

namespace emulated {
namespace {

using namespace nce::cuda;
using nce::RowStep;
using nce::StepRule;

constexpr int kThreads = 256;

int warps_of(const Launch& how, int threads = kThreads) { return how.warps > 0 ? how.warps : threads / kWarp; }

void* state(const char* name, Array& a, const py::dtype& type, const Shape& shape) {
  if (!a) return nullptr;
  contiguous(name, *a, type, shape);
  return a->mutable_data();
}

// Arrays are changed in place. state has first, second, row_steps, decayed, master, gradient_scale and seed, or None.
RowStep step_of_arrays(py::array& weight, std::vector<Array>& state_arrays, int rule, int64_t step, double rate,
                       double weight_decay, double log_decay, double momentum, double dampening, double beta1,
                       double beta2, double eps, bool nesterov, bool maximize) {
  check(weight.ndim() == 2 && state_arrays.size() == 7, "weight must be 2-D, and there must be 7 states");
  auto& [first, second, row_steps, decayed, master, scale, seed] = *reinterpret_cast<Array(*)[7]>(state_arrays.data());
  const int64_t n = weight.shape(0), dim = weight.shape(1);
  const py::dtype compute = dtype_of(compute_of(storage_of("weight", weight.dtype())));
  check_rows("weight", weight, dim);
  RowStep p{};
  p.rule = static_cast<StepRule>(rule);
  p.nesterov = nesterov;
  p.maximize = maximize;
  p.rate = rate;
  p.weight_decay = weight_decay;
  p.momentum = momentum;
  p.dampening = dampening;
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = eps;
  p.log_decay = log_decay;
  p.step = step;
  p.dim = dim;
  p.n_rows = n;
  p.weight = weight.mutable_data();
  p.weight_stride = stride_of("weight", weight);
  p.first = state("first", first, compute, {n, dim});
  p.second = state("second", second, compute, p.rule == StepRule::kRowwiseAdagrad ? Shape{n} : Shape{n, dim});
  p.row_steps = static_cast<int32_t*>(state("row_steps", row_steps, py::dtype::of<int32_t>(), {n}));
  p.decayed = static_cast<double*>(state("decayed", decayed, py::dtype::of<double>(), {n}));
  p.master = static_cast<float*>(state("master", master, py::dtype::of<float>(), {n, dim}));
  p.gradient_scale = state("gradient_scale", scale, compute, {1});
  p.seed = static_cast<const int64_t*>(state("seed", seed, py::dtype::of<int64_t>(), {2}));
  p.seed_stride = 1;
  return p;
}

struct Settled {
  Scratch memory;
  bool each;
};

Settled settle_rows(const RowStep& p, Storage storage, const int64_t* classes, int64_t n, const Launch& how) {
  const bool each = rows_differ(p);
  const int64_t n_settled = each ? n : 1;
  const auto settle = [&]<class Real>(Real) {
    Settled settled{Scratch(static_cast<size_t>(n_settled) * sizeof(SettledRow<Real>)), each};
    const int threads = warps_of(how) * kWarp;
    launch_persistent(settle_rows_kernel<Real>, (n_settled + threads - 1) / threads, threads, 0, how, p,
                      each ? classes : nullptr, n_settled, settled.memory.as<SettledRow<Real>>());
    return settled;
  };
  return storage == Storage::kDouble ? settle(double{}) : settle(float{});
}

// wide: -1 as the library does.
bool widened(bool possible, const Launch& how) {
  check(how.access < 0 || how.access == 0 || possible, "rows forbid this access");
  return how.access < 0 ? possible : how.access != 0;
}

void row_step(py::array weight, std::vector<Array> state_arrays, const py::array& gradient, Array classes, int rule,
              int64_t step, double rate, double weight_decay, double log_decay, double momentum, double dampening,
              double beta1, double beta2, double eps, bool nesterov, bool maximize, int64_t grid, int warps, int access,
              uint64_t order) {
  emulator::seed(order);
  const Launch how{grid, warps, access};
  const Storage storage = storage_of("weight", weight.dtype());
  nce::cuda::RowSteps p{};
  p.step = step_of_arrays(weight, state_arrays, rule, step, rate, weight_decay, log_decay, momentum, dampening, beta1,
                          beta2, eps, nesterov, maximize);
  check_rows("gradient", gradient, p.step.dim);
  check(gradient.dtype().is(weight.dtype()), "gradient must be of weight's dtype");
  p.n = gradient.shape(0);
  if (classes) p.classes = contiguous<int64_t>("classes", *classes, {p.n});
  check(classes || p.n == p.step.n_rows, "without classes the gradient must have all rows");
  p.gradient = gradient.data();
  p.gradient_stride = stride_of("gradient", gradient);
  if (p.n == 0 || p.step.n_rows == 0) return;
  const Settled settled = settle_rows(p.step, storage, p.classes, p.n, how);
  p.settled = settled.memory.as<void>();
  p.settled_each = settled.each;
  with_stored(storage, [&](auto stored) {
    using Stored = decltype(stored);
    const int group = step_group(p.step.dim, kPerVector<Stored>), threads = warps_of(how, kStepThreads) * kWarp;
    const int64_t each = threads / group, blocks = (p.n + each - 1) / each;
    if (widened(wide_row_step<Stored>(p, storage), how)) {
      launch_persistent(row_step_kernel<Stored, true>, blocks, threads, 0, how, p, group);
    } else {
      launch_persistent(row_step_kernel<Stored, false>, blocks, threads, 0, how, p, group);
    }
  });
}

template <class Stored, class Hidden, Access kAccess>
void launch_steps(const SegmentSteps& p, const StepSlices& slices, const Launch& how) {
  const int n_warps = warps_of(how, kStepThreads);
  launch_persistent(segment_steps_kernel<Stored, Hidden, kAccess>,
                    (p.tiles.n_tiles * slices.sums + n_warps - 1) / n_warps, n_warps * kWarp, 0, how, p,
                    static_cast<int>(slices.sums));
  launch_persistent(join_steps_kernel<Stored>, (p.tiles.n_tiles * slices.joins + kJoinWarps - 1) / kJoinWarps,
                    kJoinWarps * kWarp, join_shared_bytes<Stored>(), how, p, static_cast<int>(slices.joins));
}

void sum_into_steps(const SegmentSteps& p, Storage storage, Storage hidden_storage, const Launch& how) {
  const StepSlices slices = step_slices(p.tiles.dim, p.tiles.rows != nullptr, hidden_storage);
  with_stored(storage, [&](auto stored) {
    with_stored(hidden_storage, [&](auto hidden) {
      using Stored = decltype(stored);
      using Hidden = decltype(hidden);
      if constexpr ((sizeof(Stored) == 8) == (sizeof(Hidden) == 8)) {
        constexpr Access kNarrow = sizeof(Hidden) == 8 ? Access::kBytes8 : Access::kElements;
        if (widened(step_access<Hidden>(p, storage) == Access::kBytes16, how)) {
          launch_steps<Stored, Hidden, Access::kBytes16>(p, slices, how);
        } else {
          launch_steps<Stored, Hidden, kNarrow>(p, slices, how);
        }
      } else {
        throw std::invalid_argument("weight and hidden must both be float64 or neither");
      }
    });
  });
}

Scratch cleared_squares(SegmentSteps& p, Storage hidden_storage) {
  p.n_squares = step_slices(p.tiles.dim, p.tiles.rows != nullptr, hidden_storage).most();
  const auto bytes = static_cast<size_t>(p.n_rows * p.n_squares) * sizeof(double);
  Scratch squares(bytes);
  p.squares = squares.as<double>();
  if (bytes > 0) std::memset(p.squares, 0, bytes);
  return squares;
}

py::dict row_grad_step(const py::array& ids, const py::array& dlogit, const py::array& grad_loss,
                       const py::array& hidden, py::array weight, std::vector<Array> state_arrays, bool with_bias,
                       int rule, int64_t step, double rate, double weight_decay, double log_decay, double momentum,
                       double dampening, double beta1, double beta2, double eps, bool nesterov, bool maximize,
                       int64_t tile_pairs, int64_t grid, int warps, int access, uint64_t order) {
  emulator::seed(order);
  const Launch how{grid, warps, access};
  SegmentSteps p{};
  p.step = step_of_arrays(weight, state_arrays, rule, step, rate, weight_decay, log_decay, momentum, dampening, beta1,
                          beta2, eps, nesterov, maximize);
  check(hidden.ndim() == 2 && hidden.shape(1) == p.step.dim, "hidden must have D columns");
  const PairsOfArrays pairs(ids, dlogit, grad_loss, hidden, p.step.n_rows, tile_pairs, true, false, how);
  const Storage storage = storage_of("weight", weight.dtype());
  p.n_rows = pairs.n_padded;
  py::dict outputs;
  py::array classes = poisoned(py::dtype::of<int64_t>(), {p.n_rows});
  py::array bias = poisoned(weight.dtype(), {with_bias ? p.n_rows : 0});
  outputs["classes"] = classes;
  outputs["bias"] = bias;
  if (p.n_rows == 0) return outputs;
  std::memset(classes.mutable_data(), 0xFF, static_cast<size_t>(classes.nbytes()));
  if (with_bias) std::memset(bias.mutable_data(), 0, static_cast<size_t>(bias.nbytes()));
  p.tiles = pairs.p;
  p.tiles.segment_class = static_cast<int64_t*>(classes.mutable_data());
  p.tiles.rows = p.step.weight;
  if (with_bias) p.tiles.bias = bias.mutable_data();
  list_segments(p.tiles, p.n_rows, how);
  const Settled settled = settle_rows(p.step, storage, p.tiles.segment_class, p.n_rows, how);
  p.settled = settled.memory.as<void>();
  p.settled_each = settled.each;
  Scratch squares;
  if (p.step.rule == StepRule::kRowwiseAdagrad) {
    p.pass = Pass::kSquares;
    squares = cleared_squares(p, pairs.hidden_storage);
    sum_into_steps(p, storage, pairs.hidden_storage, how);
    const int threads = warps_of(how) * kWarp;
    const int64_t blocks = (p.n_rows + threads - 1) / threads;
    if (storage == Storage::kDouble) {
      launch_persistent(add_squares_kernel<double>, blocks, threads, 0, how, p);
    } else {
      launch_persistent(add_squares_kernel<float>, blocks, threads, 0, how, p);
    }
  }
  p.pass = Pass::kStep;
  sum_into_steps(p, storage, pairs.hidden_storage, how);
  return outputs;
}

py::array row_grad_norm(const py::array& ids, const py::array& dlogit, const py::array& grad_loss,
                        const py::array& hidden, int64_t n_classes, bool with_rows, bool with_bias, int64_t tile_pairs,
                        int64_t grid, int warps, int access, uint64_t order) {
  emulator::seed(order);
  const Launch how{grid, warps, access};
  const PairsOfArrays pairs(ids, dlogit, grad_loss, hidden, n_classes, tile_pairs, with_rows, false, how);
  py::array total = poisoned(py::dtype::of<double>(), {1});
  auto* out = static_cast<double*>(total.mutable_data());
  SegmentSteps p{};
  p.pass = Pass::kNorm;
  p.n_rows = pairs.n_padded;
  if (p.n_rows == 0 || (!with_rows && !with_bias)) {
    *out = 0;
    return total;
  }
  p.tiles = pairs.p;
  p.tiles.rows = with_rows ? p.tiles.partial_rows : nullptr;
  p.step.dim = p.tiles.dim;
  p.norm_of_bias = with_bias;
  const Scratch squares = cleared_squares(p, pairs.hidden_storage);
  sum_into_steps(p, compute_of(pairs.hidden_storage), pairs.hidden_storage, how);
  const Scratch parts(kNormParts * sizeof(double));
  const int n_warps = warps_of(how);
  launch_persistent(sum_parts_kernel, kNormParts / n_warps, n_warps * kWarp, 0, how, p.squares, p.n_rows * p.n_squares,
                    kNormParts, parts.as<double>());
  launch_persistent(sum_parts_kernel, 1, n_warps * kWarp, 0, how, parts.as<double>(), kNormParts, int64_t{1}, out);
  return total;
}

}  // namespace

#define NCE_STEP_ARGUMENTS                                                                                         \
  arg("rule"), arg("step"), arg("rate"), arg("weight_decay"), arg("log_decay"), arg("momentum"), arg("dampening"), \
      arg("beta1"), arg("beta2"), arg("eps"), arg("nesterov"), arg("maximize")

void bind_row_step(py::module_& m) {
  using py::arg;
  m.def("row_step", &row_step, arg("weight"), arg("state"), arg("gradient"), arg("classes").none(true), py::kw_only(),
        NCE_STEP_ARGUMENTS, arg("grid") = 0, arg("warps") = 0, arg("access") = -1, arg("order") = 0);
  m.def("row_grad_step", &row_grad_step, arg("ids"), arg("dlogit"), arg("grad_loss"), arg("hidden"), arg("weight"),
        arg("state"), py::kw_only(), arg("with_bias") = true, NCE_STEP_ARGUMENTS, arg("tile_pairs") = 0,
        arg("grid") = 0, arg("warps") = 0, arg("access") = -1, arg("order") = 0);
  m.def("row_grad_norm", &row_grad_norm, arg("ids"), arg("dlogit"), arg("grad_loss"), arg("hidden"), arg("n_classes"),
        py::kw_only(), arg("with_rows") = true, arg("with_bias") = true, arg("tile_pairs") = 0, arg("grid") = 0,
        arg("warps") = 0, arg("access") = -1, arg("order") = 0);
}

}  // namespace emulated
