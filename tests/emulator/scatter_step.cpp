// The racy scatter of gradient rows: its binding, and its launch as csrc/cuda/scatter_step.cu does it.
#include "scatter_step.cuh"
#include "arrays.h"

namespace emulated {
namespace {

using namespace nce::cuda;
using nce::ScatterStep;

// Changes the arrays weight and bias.
void scatter_step(const py::array& ids, const py::array& dlogit, const py::array& grad_loss, const py::array& hidden,
                  py::array weight, Array bias, double rate, int64_t grid, int warps, int access, uint64_t order) {
  const py::dtype real = py::dtype::of<float>();
  check(ids.ndim() == 2 && weight.ndim() == 2 && weight.dtype().is(real), "ids and weight must be 2-D, weight float32");
  ScatterStep p{};
  p.batch = ids.shape(0);
  p.columns = ids.shape(1);
  p.dim = weight.shape(1);
  p.n_classes = weight.shape(0);
  check_rows("weight", weight, p.dim);
  check_rows("hidden", hidden, p.dim);
  check(hidden.shape(0) == p.batch, "hidden must have B rows");
  p.ids = contiguous<int32_t>("ids", ids, {p.batch, p.columns});
  p.dlogit = static_cast<const float*>(contiguous("dlogit", dlogit, real, {p.batch, p.columns}));
  check(grad_loss.dtype().is(real) && grad_loss.ndim() == 1 && grad_loss.shape(0) == p.batch, "grad_loss must be [B]");
  p.grad_loss = static_cast<const float*>(grad_loss.data());
  p.grad_loss_stride = stride_of("grad_loss", grad_loss);
  p.hidden = hidden.data();
  p.hidden_stride = stride_of("hidden", hidden);
  p.hidden_storage = storage_of("hidden", hidden.dtype());
  p.weight = static_cast<float*>(weight.mutable_data());
  p.weight_stride = stride_of("weight", weight);
  if (bias) {
    contiguous("bias", *bias, real, {p.n_classes});
    p.bias = static_cast<float*>(bias->mutable_data());
  }
  p.rate = static_cast<float>(rate);

  emulator::seed(order);
  const Launch how{grid, warps, access};
  const int n_warps = warps > 0 ? warps : 8;
  check(access < 1 || wide_scatter(p), "rows forbid this access");
  const bool wide = access < 0 ? wide_scatter(p) : access != 0;
  with_scatter_vectors(p.dim, [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const ScatterShape shape = scatter_shape<kVectors>(p.dim);
    const int64_t blocks = (p.batch * shape.n_slices + n_warps - 1) / n_warps;
    if (wide) {
      launch_persistent(scatter_step_kernel<kVectors, true>, blocks, n_warps * kWarp, 0, how, p, shape.group,
                        static_cast<int>(shape.n_slices));
    } else {
      launch_persistent(scatter_step_kernel<kVectors, false>, blocks, n_warps * kWarp, 0, how, p, shape.group,
                        static_cast<int>(shape.n_slices));
    }
  });
}

}  // namespace

void bind_scatter_step(py::module_& m) {
  using py::arg;
  m.def("scatter_step", &scatter_step, arg("ids"), arg("dlogit"), arg("grad_loss"), arg("hidden"), arg("weight"),
        arg("bias").none(true), arg("rate"), py::kw_only(), arg("grid") = 0, arg("warps") = 0, arg("access") = -1,
        arg("order") = 0);
}

}  // namespace emulated
