// The operator scatter_step_: its arguments, which are checked here, as a device's code takes them. Each device
// registers an instance of the entry, for a function of its own that does the work.
#pragma once

#include <optional>

#include "row_grad_call.h"
#include "scatter_step.h"

namespace nce {

inline ScatterStep prepare_scatter_step(const PairArguments& pairs, const Tensor& weight,
                                        const std::optional<Tensor>& bias, double rate) {
  const auto& [ids, dlogit, grad_loss, hidden] = pairs;
  check_tensor("weight", weight, ScalarType::Float, hidden);
  check_rows("weight", weight);
  const RowGradCall call = check_row_grad(pairs, weight.size(0), ScalarType::Float);
  STD_TORCH_CHECK(hidden.size(1) == weight.size(1), "hidden must have ", weight.size(1), " columns, got ",
                  hidden.size(1));
  if (bias) {
    check_tensor("bias", *bias, ScalarType::Float, hidden);
    check_shape("bias", *bias, {weight.size(0)});
    STD_TORCH_CHECK(bias->is_contiguous(), "bias must be contiguous");
  }
  ScatterStep p{};
  p.batch = call.batch;
  p.columns = call.columns;
  p.dim = call.dim;
  p.n_classes = call.n_classes;
  p.ids = static_cast<const int32_t*>(ids.const_data_ptr());
  p.dlogit = static_cast<const float*>(dlogit.const_data_ptr());
  p.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
  p.grad_loss_stride = grad_loss.stride(0);
  p.hidden = hidden.const_data_ptr();
  p.hidden_stride = hidden.stride(0);
  p.hidden_storage = call.hidden_storage;
  p.weight = static_cast<float*>(weight.mutable_data_ptr());
  p.weight_stride = weight.stride(0);
  p.bias = bias ? static_cast<float*>(bias->mutable_data_ptr()) : nullptr;
  p.rate = static_cast<float>(rate);
  return p;
}

// Run: void (const ScatterStep&, const Tensor& weight), where the tensor says where kernels run.
template <auto Run>
void scatter_step_(const PairArguments& pairs, const Tensor& weight, const std::optional<Tensor>& bias, double rate) {
  Run(prepare_scatter_step(pairs, weight, bias, rate), weight);
}

}  // namespace nce
