// The CUDA kernels as the emulator runs them: what kernels.cpp binds to Python. Neither pybind11 nor torch is needed to
// compile them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "row_grad_join.cuh"
#include "sampled_loss.cuh"

namespace emulated {

using nce::SampledLoss;
using nce::Storage;
using nce::cuda::Access;
using nce::cuda::kWarp;
using nce::cuda::Purpose;
using nce::cuda::RowGradTiles;
using nce::cuda::with_stored;

// How kernels are launched. Nothing of it may change a result.
struct Launch {
  int64_t grid;  // blocks at most; 0: one for each block of work
  int warps;     // of a block, where the kernel leaves that open; 0: as the library does
  int access;    // bytes read at once, 0 for elements; -1: as the library does
};

// Mirrors launch_persistent of csrc/cuda/launch.cuh.
template <class... Parameters, class... Arguments>
void launch_persistent(void (*kernel)(Parameters...), int64_t blocks_of_work, int threads, size_t shared_bytes,
                       const Launch& how, const Arguments&... arguments) {
  if (blocks_of_work == 0) return;
  const int64_t grid = how.grid > 0 ? std::min(blocks_of_work, how.grid) : blocks_of_work;
  emulator::launch(dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(threads)), shared_bytes, kernel,
                   arguments...);
}

// Calls f(access as a constant) with what rows at `base` allow, or with the narrower one that is asked for.
template <class Stored, class F>
void with_access(const void* base, int64_t stride, int64_t dim, const Launch& how, F&& f) {
  const int64_t size = sizeof(Stored);
  const Access widest = nce::cuda::access_of(base, stride * size, dim * size);
  const Access access = how.access < 0 ? widest : static_cast<Access>(how.access);
  if (static_cast<int>(access) > static_cast<int>(widest)) throw std::invalid_argument("rows forbid this access");
  nce::cuda::with_access<Stored>(access, f);
}

// Mirrors sampled_loss_of of csrc/cuda/sampled_loss_launch.cuh.
template <class Stored, Purpose kPurpose>
void sampled_loss_of(const SampledLoss& p, const Launch& how) {
  using namespace nce::cuda;
  with_row_shape<Stored>(p.dim, [&](auto shape, int n_warps) {
    using Shape = decltype(shape);
    if (!Shape::kSplit && how.warps > 0) n_warps = how.warps;
    if (n_warps * kWarp > Shape::kThreads) throw std::invalid_argument("more warps than a block may have");
    const int64_t per_block = Shape::kSplit ? 1 : n_warps;
    with_access<Stored>(p.weight, p.weight_stride, p.dim, how, [&](auto access) {
      launch_persistent(sampled_loss_kernel<Stored, Shape, decltype(access)::value, kPurpose>,
                        (p.batch + per_block - 1) / per_block, n_warps * kWarp,
                        sampled_loss_shared_bytes<Stored, Shape>(n_warps), how, p);
    });
  });
}

void sampled_loss(const SampledLoss& p, Storage storage, const Launch& how);
void whole_example(const SampledLoss& p, Storage storage, const Launch& how);

}  // namespace emulated
