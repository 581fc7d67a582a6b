// The fused forward pass of the binary objective for weights stored as double.
#include "sampled_loss_launch.cuh"

void nce::cuda::sampled_loss_double(const SampledLoss& p, const OnDevice& device) {
  sampled_loss_of<double, Purpose::kBinary>(p, device);
}
