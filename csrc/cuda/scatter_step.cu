// Entry point of the racy scatter of gradient rows: the result differs from run to run, by design.
#include "scatter_step.cuh"

#include <torch/csrc/stable/library.h>

#include "../scatter_step_call.h"
#include "launch.cuh"

namespace nce::cuda {
namespace {

template <int kVectors, bool kWide>
void launch_scatter(const ScatterStep& p, const OnDevice& device) {
  constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  const ScatterShape shape = scatter_shape<kVectors>(p.dim);
  static Occupancy occupancy;
  launch_persistent(scatter_step_kernel<kVectors, kWide>, (p.batch * shape.n_slices + kWarps - 1) / kWarps, kThreads, 0,
                    device, occupancy, p, shape.group, static_cast<int>(shape.n_slices));
}

void run_scatter_step(const ScatterStep& p, const Tensor& weight) {
  const OnDevice device(weight);
  with_scatter_vectors(p.dim, [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    if (wide_scatter(p)) return launch_scatter<kVectors, true>(p, device);
    launch_scatter<kVectors, false>(p, device);
  });
}

}  // namespace
}  // namespace nce::cuda

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CUDA, m) {
  m.impl("scatter_step_", TORCH_BOX(&nce::Operator<&nce::scatter_step_<nce::cuda::run_scatter_step>>::call));
}
