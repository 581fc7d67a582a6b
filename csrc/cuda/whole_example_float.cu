// The fused forward pass of objectives over the whole example for weights stored as float.
#include "sampled_loss_launch.cuh"

void nce::cuda::whole_example_float(const SampledLoss& p, const OnDevice& device) {
  sampled_loss_of<float, Purpose::kWhole>(p, device);
}
