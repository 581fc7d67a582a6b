// The fused forward pass of objectives over the whole example for weights stored as bfloat16.
#include "sampled_loss_launch.cuh"

void nce::cuda::whole_example_bfloat16(const SampledLoss& p, const OnDevice& device) {
  sampled_loss_of<BFloat16, Purpose::kWhole>(p, device);
}
