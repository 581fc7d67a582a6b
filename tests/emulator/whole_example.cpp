// The fused forward pass of objectives over the whole example; see kernels.h.
#include "kernels.h"

void emulated::whole_example(const SampledLoss& p, Storage storage, const Launch& how) {
  with_stored(storage, [&](auto stored) { sampled_loss_of<decltype(stored), Purpose::kWhole>(p, how); });
}
