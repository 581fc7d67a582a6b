// The fused forward pass of objectives over the whole example for weights stored as half.
#include "sampled_loss_launch.cuh"

void nce::cuda::whole_example_half(const SampledLoss& p, const OnDevice& device) {
  sampled_loss_of<Half, Purpose::kWhole>(p, device);
}
