// The racy in-place step; see kernels.h.
#include "kernels.h"

void emulated::scatter(const SampledLoss& p, const InPlaceUpdate& update, const Launch& how) {
  sampled_loss_of<float, Purpose::kUpdate>(p, update, how);
}
