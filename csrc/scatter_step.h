// Parameters of the racy step of SGD: weight[ids[b, c]] -= rate * grad_loss[b] * dlogit[b, c] * hidden[b] for all b, c.
#pragma once

#include "sampled_loss.h"

namespace nce {

struct ScatterStep {
  int64_t batch, columns, dim, n_classes;
  const int32_t* ids;      // [batch, columns], -1: no class
  const float* dlogit;     // [batch, columns]
  const float* grad_loss;  // [batch]
  int64_t grad_loss_stride;
  const void* hidden;
  int64_t hidden_stride;
  Storage hidden_storage;
  float* weight;  // [n_classes, dim]
  int64_t weight_stride;
  float* bias;  // [n_classes], or null
  float rate;
};

}  // namespace nce
