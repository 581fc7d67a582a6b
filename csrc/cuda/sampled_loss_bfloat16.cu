// The fused forward pass of the binary objective for weights stored as bfloat16.
#include "sampled_loss_launch.cuh"

void nce::cuda::sampled_loss_bfloat16(const SampledLoss& p, const OnDevice& device) {
  sampled_loss_of<BFloat16, Purpose::kBinary>(p, device);
}
