// The fused forward pass of the binary objective; see kernels.h.
#include "kernels.h"

void emulated::sampled_loss(const SampledLoss& p, Storage storage, const Launch& how) {
  with_stored(storage, [&](auto stored) { sampled_loss_of<decltype(stored), Purpose::kBinary>(p, how); });
}
