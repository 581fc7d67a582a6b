// Instantiates the kernels for one instruction set; see kernels_<level>.cpp.
#pragma once

#include "../example_objective.h"
#include "kernels.h"
#include "row_grad_kernel.h"
#include "row_step_kernel.h"
#include "sample_kernel.h"
#include "sampled_loss_kernel.h"
#include "scatter_step_kernel.h"
#include "shared_loss_kernel.h"
#include "simd.h"

#define NCE_STRINGIFY(name) NCE_STRINGIFY_EXPANDED(name)
#define NCE_STRINGIFY_EXPANDED(name) #name

namespace nce::NCE_SIMD_NAMESPACE {

static constexpr Kernels kTable = {
    NCE_STRINGIFY(NCE_SIMD_NAMESPACE),
    sample,
    {sampled_loss<float, float>, sampled_loss<BFloat16, float>, sampled_loss<Half, float>,
     sampled_loss<double, double>},
    {shared_loss<float, float>, shared_loss<BFloat16, float>, shared_loss<Half, float>, shared_loss<double, double>},
    {row_grad<float, float>, row_grad<BFloat16, float>, row_grad<Half, float>, row_grad<double, double>},
    {row_step<float, float>, row_step<BFloat16, float>, row_step<Half, float>, row_step<double, double>},
    {row_grad_step<float, float>, row_grad_step<BFloat16, float>, row_grad_step<Half, float>,
     row_grad_step<double, double>},
    {row_grad_norm<float>, row_grad_norm<double>},
    scatter_step,
};

}  // namespace nce::NCE_SIMD_NAMESPACE
