// The fused forward pass of the binary objective for weights stored as half.
#include "sampled_loss_launch.cuh"

void nce::cuda::sampled_loss_half(const SampledLoss& p, const OnDevice& device) {
  sampled_loss_of<Half, Purpose::kBinary>(p, device);
}
