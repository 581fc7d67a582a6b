// Entry point: noise ids.
#include "sample.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "launch.cuh"

namespace nce::cuda {
namespace {

Tensor sample(Tensor seed, Tensor table, int64_t kind, int64_t n_classes, int64_t rows, int64_t cols) {
  const OnDevice device(seed);
  Sample p{};
  p.seed = seed_words(seed, seed);
  p.seed_stride = seed.stride(0);
  p.noise = noise_of(kind, n_classes, table, seed);
  check_sample_shape(rows, cols);
  Tensor ids = torch::stable::new_empty(seed, {rows, cols});
  p.rows = rows;
  p.columns = cols;
  p.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  constexpr int kThreads = 256;
  static Occupancy occupancy;
  const int64_t pairs = rows * ((cols + 1) / 2);
  launch_persistent(sample_kernel, (pairs + kThreads - 1) / kThreads, kThreads, 0, device, occupancy, p);
  return ids;
}

}  // namespace
}  // namespace nce::cuda

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CUDA, m) { m.impl("sample", TORCH_BOX(&nce::cuda::sample)); }
