// The fused forward pass of the binary objective for weights stored as float.
#include "sampled_loss_launch.cuh"

void nce::cuda::sampled_loss_float(const SampledLoss& p, const OnDevice& device) {
  sampled_loss_of<float, Purpose::kBinary>(p, device);
}
