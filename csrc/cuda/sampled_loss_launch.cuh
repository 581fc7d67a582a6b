// Picks and launches the kernel of the fused forward pass for one storage type; a translation unit for each.
#pragma once

#include "launch.cuh"
#include "sampled_loss.cuh"

namespace nce::cuda {

template <class Stored, class Shape, Access kAccess, Purpose kPurpose>
void launch_sampled_loss(const SampledLoss& p, int n_warps, const OnDevice& device) {
  const auto kernel = sampled_loss_kernel<Stored, Shape, kAccess, kPurpose>;
  const size_t shared_bytes = sampled_loss_shared_bytes<Stored, Shape>(n_warps);
  allow_shared_bytes(kernel, shared_bytes);
  const int64_t per_block = Shape::kSplit ? 1 : n_warps;
  // A kernel whose rows are split runs with blocks of several sizes.
  static Occupancy occupancy[Shape::kThreads / kWarp + 1];
  launch_persistent(kernel, (p.batch + per_block - 1) / per_block, n_warps * kWarp, shared_bytes, device,
                    occupancy[n_warps], p);
}

template <class Stored, Purpose kPurpose>
void sampled_loss_of(const SampledLoss& p, const OnDevice& device) {
  STD_TORCH_CHECK(p.dim <= kMaxDim, "hidden must have at most ", kMaxDim, " columns on CUDA, got ", p.dim);
  const int64_t size = sizeof(Stored);
  with_row_shape<Stored>(p.dim, [&](auto shape, int n_warps) {
    with_access<Stored>(access_of(p.weight, p.weight_stride * size, p.dim * size), [&](auto access) {
      launch_sampled_loss<Stored, decltype(shape), decltype(access)::value, kPurpose>(p, n_warps, device);
    });
  });
}

void sampled_loss_float(const SampledLoss& p, const OnDevice& device);
void sampled_loss_bfloat16(const SampledLoss& p, const OnDevice& device);
void sampled_loss_half(const SampledLoss& p, const OnDevice& device);
void sampled_loss_double(const SampledLoss& p, const OnDevice& device);
void whole_example_float(const SampledLoss& p, const OnDevice& device);
void whole_example_bfloat16(const SampledLoss& p, const OnDevice& device);
void whole_example_half(const SampledLoss& p, const OnDevice& device);
void whole_example_double(const SampledLoss& p, const OnDevice& device);

}  // namespace nce::cuda
