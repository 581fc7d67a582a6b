// Entry point of the optimizers' steps on rows whose gradient lies in memory. It waits for nothing.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "row_step_launch.cuh"

namespace nce::cuda {

namespace {

constexpr int kThreads = 256;

template <class Real>
Settled settle_rows_of(const RowStep& p, const int64_t* classes, int64_t n, const Tensor& like,
                       const OnDevice& device) {
  const bool each = rows_differ(p);
  const int64_t n_settled = each ? n : 1;
  const auto bytes = n_settled * static_cast<int64_t>(sizeof(SettledRow<Real>));
  Settled settled{torch::stable::new_empty(like, {bytes}, ScalarType::Byte), each};
  static Occupancy settling;
  launch_persistent(settle_rows_kernel<Real>, (n_settled + kThreads - 1) / kThreads, kThreads, 0, device, settling, p,
                    each ? classes : nullptr, n_settled,
                    static_cast<SettledRow<Real>*>(settled.memory.mutable_data_ptr()));
  return settled;
}

template <class Stored, bool kWide>
void launch_row_step(const RowSteps& p, const OnDevice& device) {
  const int group = step_group(p.step.dim, kPerVector<Stored>);
  const int64_t each = kStepThreads / group;
  static Occupancy stepping;
  launch_persistent(row_step_kernel<Stored, kWide>, (p.n + each - 1) / each, kStepThreads, 0, device, stepping, p,
                    group);
}

void run_row_step(const RowStepCall& call) {
  const OnDevice device(call.weight);
  RowSteps p{call.step, call.n, call.classes, call.gradient, call.gradient_stride};
  if (p.n == 0 || p.step.dim == 0 || p.step.n_rows == 0) return;
  const Settled settled = settle_rows(p.step, call.storage, p.classes, p.n, call.weight, device);
  p.settled = settled.memory.const_data_ptr();
  p.settled_each = settled.each;
  with_stored(call.storage, [&](auto stored) {
    using Stored = decltype(stored);
    if (wide_row_step<Stored>(p, call.storage)) return launch_row_step<Stored, true>(p, device);
    launch_row_step<Stored, false>(p, device);
  });
}

}  // namespace

Settled settle_rows(const RowStep& p, Storage storage, const int64_t* classes, int64_t n, const Tensor& like,
                    const OnDevice& device) {
  return storage == Storage::kDouble ? settle_rows_of<double>(p, classes, n, like, device)
                                     : settle_rows_of<float>(p, classes, n, like, device);
}

}  // namespace nce::cuda

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CUDA, m) {
  m.impl("row_step_", TORCH_BOX(&nce::Operator<&nce::row_step_<nce::cuda::run_row_step>>::call));
}
