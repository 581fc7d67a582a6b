// Entry point of the epilogue of shared negatives: the kernel of the weight's storage type. It waits for nothing.
#include "shared_loss.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../shared_loss_call.h"
#include "launch.cuh"

namespace nce::cuda {
namespace {

template <class Stored>
void launch_shared_loss(const SharedLoss& p, const OnDevice& device) {
  constexpr size_t kGrain = 4096;  // in which shared memory is asked for, so that few sizes occur
  const int n_warps = shared_loss_warps(p);
  const size_t grains = (shared_loss_bytes<Compute<Stored>>(p) + kGrain - 1) / kGrain;
  static Occupancy occupancy[kSharedWarps + 1][12];
  launch_persistent(shared_loss_kernel<Stored>, p.batch, n_warps * kWarp, grains * kGrain, device,
                    occupancy[n_warps][grains], p);
}

void run(const SharedLossCall& call, const OnDevice& device) {
  with_stored(call.storage, [&](auto stored) { launch_shared_loss<decltype(stored)>(call.p, device); });
}

constexpr auto kSharedLoss = &Operator<&nce::shared_loss_<OnDevice, run>>::call;

}  // namespace
}  // namespace nce::cuda

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CUDA, m) { m.impl("shared_loss_", TORCH_BOX(nce::cuda::kSharedLoss)); }
