// The fused forward pass; see kernels.h.
#include "kernels.h"

void emulated::sampled_loss(const SampledLoss& p, Storage storage, const Launch& how) {
  with_stored(storage, [&](auto stored) { sampled_loss_of<decltype(stored), false>(p, InPlaceUpdate{}, how); });
}
