// The Python module emulated_kernels: the CUDA kernels on numpy arrays, run by the emulator of the grid.
#include <cmath>

#include "arrays.h"
#include "sample.cuh"

namespace emulated {
namespace {

using nce::AliasEntry;
using nce::Noise;
using nce::NoiseKind;

Noise noise_of(int kind, int64_t n_classes, const Array& table) {
  Noise noise = nce::noise_without_table(static_cast<NoiseKind>(kind), n_classes);
  if (noise.kind == NoiseKind::kAlias) {
    check(table.has_value(), "table must be given");
    noise.table = reinterpret_cast<const AliasEntry*>(contiguous<int32_t>("table", *table, {n_classes, 4}));
  }
  return noise;
}

const int64_t* seed_of(const py::array& seed, int64_t* stride) {
  check(seed.dtype().is(py::dtype::of<int64_t>()) && seed.ndim() == 1 && seed.shape(0) == 2, "seed must be int64 [2]");
  *stride = stride_of("seed", seed);
  return static_cast<const int64_t*>(seed.data());
}

// (vectors, group, rows, whether a row is split among warps, whether it is held) of RowShape.
py::tuple row_shape(const py::dtype& dtype, int64_t dim) {
  py::tuple fields;
  with_stored(storage_of("dtype", dtype), [&](auto stored) {
    nce::cuda::with_row_shape<decltype(stored)>(dim, [&](auto shape, int) {
      using S = decltype(shape);
      fields = py::make_tuple(S::kVectors, S::kGroup, S::kRows, S::kSplit, S::kHold);
    });
  });
  return fields;
}

py::array sample(int kind, int64_t n_classes, const Array& table, const py::array& seed, int64_t rows, int64_t columns,
                 int64_t grid, int threads, uint64_t order) {
  nce::cuda::Sample p{};
  p.noise = noise_of(kind, n_classes, table);
  p.seed = seed_of(seed, &p.seed_stride);
  p.rows = rows;
  p.columns = columns;
  py::array ids = poisoned(py::dtype::of<int64_t>(), {rows, columns});
  p.ids = static_cast<int64_t*>(ids.mutable_data());
  emulator::seed(order);
  const int64_t pairs = rows * ((columns + 1) / 2);
  launch_persistent(nce::cuda::sample_kernel, (pairs + threads - 1) / threads, threads, 0, Launch{grid, 0, -1}, p);
  return ids;
}

int64_t shared_stride(const py::array& a, int64_t batch, int64_t n) { return a.shape(0) == 1 && batch != 1 ? 0 : n; }

// All of SampledLoss but its outputs. n_negatives counts when negatives are not given.
SampledLoss arguments_of(const py::array& hidden, const py::array& weight, const Array& bias, const py::array& target,
                         const Array& log_z, const Array& seed, int kind, const Array& table, int64_t n_negatives,
                         const Array& negatives, const Array& target_log_q, const Array& negative_log_q) {
  SampledLoss p{};
  const Storage storage = storage_of("weight", weight.dtype());
  const py::dtype compute = dtype_of(compute_of(storage));
  p.hidden_storage = storage_of("hidden", hidden.dtype());
  check(compute_of(p.hidden_storage) == compute_of(storage), "hidden and weight must both be float64 or neither");
  check(weight.ndim() == 2, "weight must have two dimensions");
  p.batch = hidden.shape(0);
  p.dim = weight.shape(1);
  p.n_classes = weight.shape(0);
  check(p.dim >= 1 && p.dim <= nce::cuda::kMaxDim, "D is too large");
  check_rows("hidden", hidden, p.dim);
  check_rows("weight", weight, p.dim);
  p.hidden = hidden.data();
  p.hidden_stride = stride_of("hidden", hidden);
  p.weight = weight.data();
  p.weight_stride = stride_of("weight", weight);
  if (bias) p.bias = contiguous("bias", *bias, weight.dtype(), {p.n_classes});
  check(target.ndim() == 2, "target must have two dimensions");
  p.n_targets = target.shape(1);
  p.target = contiguous<int64_t>("target", target, {p.batch, p.n_targets});
  if (log_z) {
    check(log_z->dtype().is(compute) && log_z->ndim() == 1 && log_z->shape(0) == p.batch, "log_z must be [B]");
    p.log_z = log_z->data();
    p.log_z_stride = stride_of("log_z", *log_z);
  }
  p.noise = noise_of(kind, p.n_classes, table);
  if (seed) p.seed = seed_of(*seed, &p.seed_stride);
  check(seed || negatives, "seed or negatives must be given");
  p.n_negatives = negatives ? negatives->shape(1) : n_negatives;
  if (negatives) {
    p.negatives = contiguous<int64_t>("negatives", *negatives, {negatives->shape(0), p.n_negatives});
    check(negatives->shape(0) == p.batch || negatives->shape(0) == 1, "negatives must have B rows or 1");
    p.negatives_stride = shared_stride(*negatives, p.batch, p.n_negatives);
  }
  if (target_log_q) {
    p.target_log_q = contiguous("target_log_q", *target_log_q, compute, {p.batch, p.n_targets});
  }
  if (negative_log_q) {
    check(negatives.has_value(), "negative_log_q must come with negatives");
    const Shape shape{negative_log_q->shape(0), p.n_negatives};
    p.negative_log_q = contiguous("negative_log_q", *negative_log_q, compute, shape);
    check(shape[0] == p.batch || shape[0] == 1, "negative_log_q must have B rows or 1");
    p.negative_log_q_stride = shared_stride(*negative_log_q, p.batch, p.n_negatives);
  }
  return p;
}

py::dict sampled_loss_of_arrays(const py::array& hidden, const py::array& weight, const Array& bias,
                                const py::array& target, const Array& log_z, const Array& seed, int kind,
                                const Array& table, int64_t n_negatives, const Array& negatives,
                                const Array& target_log_q, const Array& negative_log_q, bool subtract_log_q,
                                double offset, bool remove_hits, bool uniform_labels, bool mean_candidates,
                                int64_t ignore_index, int objective, double positive_weight, double label_smoothing,
                                double temperature, bool correct_positive, bool hidden_grad, bool row_grad,
                                int64_t grid, int warps, int access, uint64_t order) {
  SampledLoss p = arguments_of(hidden, weight, bias, target, log_z, seed, kind, table, n_negatives, negatives,
                               target_log_q, negative_log_q);
  p.subtract_log_q = subtract_log_q;
  p.offset = offset;
  p.remove_hits = remove_hits;
  p.uniform_labels = uniform_labels;
  p.mean_candidates = mean_candidates;
  p.ignore_index = ignore_index;
  p.objective = nce::Objective{static_cast<nce::ObjectiveKind>(objective), positive_weight, label_smoothing,
                               temperature, correct_positive};
  const bool whole = p.objective.kind != nce::ObjectiveKind::kBinary;

  const Storage storage = storage_of("weight", weight.dtype());
  const py::dtype compute = dtype_of(compute_of(storage));
  const int64_t columns = p.n_targets + p.n_negatives;
  py::dict outputs;
  const auto output = [&](const char* name, const py::dtype& type, const Shape& shape) {
    py::array a = poisoned(type, shape);
    outputs[name] = a;
    return a.mutable_data();
  };
  p.loss = output("loss", compute, {p.batch});
  if (row_grad || (whole && hidden_grad)) {
    p.ids = static_cast<int32_t*>(output("ids", py::dtype::of<int32_t>(), {p.batch, columns}));
    p.dlogit = output("dlogit", compute, {p.batch, columns});
  }
  if (hidden_grad) p.grad_hidden = output("grad_hidden", compute, {p.batch, p.dim});

  emulator::seed(order);
  const Launch how{grid, warps, access};
  if (whole) {
    whole_example(p, storage, how);
  } else {
    sampled_loss(p, storage, how);
  }
  return outputs;
}

}  // namespace
}  // namespace emulated

PYBIND11_MODULE(emulated_kernels, m) {
  using namespace emulated;
  using py::arg;
  const py::none none;
  py::register_exception<emulator::Error>(m, "Error", PyExc_RuntimeError);
  m.def("switches", &emulator::switches);
  m.def("row_shape", &row_shape);
  m.def("sample", &sample, arg("kind"), arg("n_classes"), arg("table"), arg("seed"), arg("rows"), arg("columns"),
        py::kw_only(), arg("grid") = 0, arg("threads") = 256, arg("order") = 0);
  m.def("sampled_loss", &sampled_loss_of_arrays, py::kw_only(), arg("hidden"), arg("weight"), arg("bias") = none,
        arg("target"), arg("log_z") = none, arg("seed") = none, arg("kind") = 0, arg("table") = none,
        arg("n_negatives") = 0, arg("negatives") = none, arg("target_log_q") = none, arg("negative_log_q") = none,
        arg("subtract_log_q") = true, arg("offset") = 0.0, arg("remove_hits") = false, arg("uniform_labels") = false,
        arg("mean_candidates") = false, arg("ignore_index") = -100, arg("objective") = 0, arg("positive_weight") = 1.0,
        arg("label_smoothing") = 0.0, arg("temperature") = 0.0, arg("correct_positive") = true,
        arg("hidden_grad") = true, arg("row_grad") = true, arg("grid") = 0, arg("warps") = 0, arg("access") = -1,
        arg("order") = 0);
  bind_row_grad(m);
  bind_row_step(m);
  bind_scatter_step(m);
  bind_shared_loss(m);
}
