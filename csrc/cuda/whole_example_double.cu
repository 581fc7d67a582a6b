// The fused forward pass of objectives over the whole example for weights stored as double.
#include "sampled_loss_launch.cuh"

void nce::cuda::whole_example_double(const SampledLoss& p, const OnDevice& device) {
  sampled_loss_of<double, Purpose::kWhole>(p, device);
}
