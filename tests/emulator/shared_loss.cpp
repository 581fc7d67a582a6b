// The epilogue of shared negatives: its binding, and its launch as the library does it.
#include "shared_loss.cuh"

#include "arrays.h"

namespace emulated {
namespace {

using nce::SharedLoss;
using nce::cuda::Compute;

// Mirrors launch_shared_loss of csrc/cuda/shared_loss.cu.
void launch(const SharedLoss& p, Storage storage, const Launch& how) {
  with_stored(storage, [&](auto stored) {
    using Stored = decltype(stored);
    launch_persistent(nce::cuda::shared_loss_kernel<Stored>, p.batch, nce::cuda::shared_loss_warps(p) * kWarp,
                      nce::cuda::shared_loss_bytes<Compute<Stored>>(p), how, p);
  });
}

// Changes the array logits.
py::dict shared_loss(py::array logits, const py::array& hidden, const py::array& weight, const Array& bias,
                     const py::array& target, const Array& target_log_q, const Array& log_z,
                     const py::array& column_shift, const Array& multiplicity, const Array& accidental_hits,
                     const Array& example_weight, double offset, bool uniform_labels, bool mean_candidates,
                     int64_t n_draws, int64_t ignore_index, int objective, double positive_weight,
                     double label_smoothing, double temperature, bool correct_positive, bool derivatives,
                     bool hidden_grad, int64_t grid, uint64_t order) {
  SharedLoss p{};
  const Storage storage = storage_of("weight", weight.dtype());
  const py::dtype compute = dtype_of(compute_of(storage));
  p.hidden_storage = storage_of("hidden", hidden.dtype());
  check(compute_of(p.hidden_storage) == compute_of(storage), "hidden and weight must both be float64 or neither");
  check(weight.ndim() == 2 && logits.ndim() == 2 && target.ndim() == 2, "there must be two dimensions");
  p.batch = hidden.shape(0);
  p.dim = weight.shape(1);
  p.n_classes = weight.shape(0);
  p.n_targets = target.shape(1);
  p.n_columns = logits.shape(1);
  check_rows("hidden", hidden, p.dim);
  check_rows("weight", weight, p.dim);
  check_rows("logits", logits, p.n_columns);
  check(logits.dtype().is(compute) && logits.shape(0) == p.batch, "logits must be [B, U]");
  p.hidden = hidden.data();
  p.hidden_stride = stride_of("hidden", hidden);
  p.weight = weight.data();
  p.weight_stride = stride_of("weight", weight);
  p.target = contiguous<int64_t>("target", target, {p.batch, p.n_targets});
  if (bias) p.bias = contiguous("bias", *bias, weight.dtype(), {p.n_classes});
  if (target_log_q) p.target_log_q = contiguous("target_log_q", *target_log_q, compute, {p.batch, p.n_targets});
  if (log_z) {
    check(log_z->dtype().is(compute) && log_z->ndim() == 1 && log_z->shape(0) == p.batch, "log_z must be [B]");
    p.log_z = log_z->data();
    p.log_z_stride = stride_of("log_z", *log_z);
  }
  p.column_shift = contiguous("column_shift", column_shift, compute, {p.n_columns});
  if (multiplicity) p.multiplicity = contiguous("multiplicity", *multiplicity, compute, {p.n_columns});
  if (accidental_hits)
    p.accidental_hits = contiguous<int32_t>("accidental_hits", *accidental_hits, {p.batch, p.n_targets, 2});
  if (example_weight) p.example_weight = contiguous("example_weight", *example_weight, compute, {p.batch});
  p.offset = offset;
  p.uniform_labels = uniform_labels;
  p.mean_candidates = mean_candidates;
  p.n_draws = n_draws;
  p.ignore_index = ignore_index;
  p.objective = nce::Objective{static_cast<nce::ObjectiveKind>(objective), positive_weight, label_smoothing,
                               temperature, correct_positive};
  p.needs_derivatives = derivatives;

  py::dict outputs;
  const auto output = [&](const char* name, const py::dtype& type, const Shape& shape) {
    py::array a = poisoned(type, shape);
    outputs[name] = a;
    return a.mutable_data();
  };
  p.logits = logits.mutable_data();
  p.logits_stride = p.batch > 1 ? stride_of("logits", logits) : p.n_columns;
  p.loss = output("loss", compute, {p.batch});
  if (derivatives) {
    p.target_ids = static_cast<int32_t*>(output("target_ids", py::dtype::of<int32_t>(), {p.batch, p.n_targets}));
    p.target_dlogit = output("target_dlogit", compute, {p.batch, p.n_targets});
    p.grad_shift = output("grad_shift", compute, {p.batch});
    if (hidden_grad) p.grad_hidden = output("grad_hidden", compute, {p.batch, p.dim});
  }
  emulator::seed(order);
  launch(p, storage, Launch{grid, 0, -1});
  return outputs;
}

}  // namespace

void bind_shared_loss(py::module_& m) {
  using py::arg;
  const py::none none;
  m.def("shared_loss", &shared_loss, py::kw_only(), arg("logits"), arg("hidden"), arg("weight"), arg("bias") = none,
        arg("target"), arg("target_log_q") = none, arg("log_z") = none, arg("column_shift"), arg("multiplicity") = none,
        arg("accidental_hits") = none, arg("example_weight") = none, arg("offset") = 0.0, arg("uniform_labels") = false,
        arg("mean_candidates") = false, arg("n_draws") = 0, arg("ignore_index") = -100, arg("objective") = 0,
        arg("positive_weight") = 1.0, arg("label_smoothing") = 0.0, arg("temperature") = 0.0,
        arg("correct_positive") = true, arg("derivatives") = true, arg("hidden_grad") = true, arg("grid") = 0,
        arg("order") = 0);
}

}  // namespace emulated
