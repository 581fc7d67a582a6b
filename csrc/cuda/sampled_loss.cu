// Entry point of the fused forward pass: the kernel of the weight's storage type. It waits for nothing.
#include <torch/csrc/stable/library.h>

#include "../sampled_loss_call.h"
#include "sampled_loss_launch.cuh"

namespace nce::cuda {
namespace {

void run(const SampledLossCall& call, const OnDevice& device) {
  const bool whole = call.p.objective.kind != ObjectiveKind::kBinary;
  switch (call.storage) {
    case Storage::kFloat:
      whole ? whole_example_float(call.p, device) : sampled_loss_float(call.p, device);
      break;
    case Storage::kBFloat16:
      whole ? whole_example_bfloat16(call.p, device) : sampled_loss_bfloat16(call.p, device);
      break;
    case Storage::kHalf:
      whole ? whole_example_half(call.p, device) : sampled_loss_half(call.p, device);
      break;
    case Storage::kDouble:
      whole ? whole_example_double(call.p, device) : sampled_loss_double(call.p, device);
      break;
  }
}

constexpr auto kSampledLoss = &Operator<&nce::sampled_loss<OnDevice, run>>::call;

}  // namespace
}  // namespace nce::cuda

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CUDA, m) { m.impl("sampled_loss", TORCH_BOX(nce::cuda::kSampledLoss)); }
