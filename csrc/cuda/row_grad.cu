// Entry points of the row gradient: a stable radix sort of the pairs by class, then sums in a fixed order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <tuple>

#include "../row_grad_call.h"
#include "launch.cuh"
#include "row_grad_launch.cuh"
#include "segments.cuh"

namespace nce::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace

RowGradWork sort_row_grad(const PairArguments& pairs, int64_t n_classes, ScalarType dtype, bool with_rows,
                          bool by_class, const OnDevice& device) {
  const auto& [ids, dlogit, grad_loss, hidden] = pairs;
  const RowGradCall call = check_row_grad(pairs, n_classes, dtype);
  const int64_t n = call.n_pairs, tile_pairs = tile_pairs_for(n), n_tiles = (n + tile_pairs - 1) / tile_pairs;
  const ScalarType compute = compute_type(call.hidden_storage);
  RowGradWork work{
      call,
      {},
      torch::stable::new_empty(ids, {n}, ScalarType::Int),
      torch::stable::new_empty(ids, {n}, ScalarType::Int),
      torch::stable::new_empty(ids, {by_class ? 0 : n_tiles + 1}, ScalarType::Int),
      torch::stable::new_empty(hidden, {with_rows ? 2 * n_tiles : 0, call.dim}, compute),
      torch::stable::new_empty(hidden, {2 * n_tiles}, compute),
  };
  RowGradTiles& p = work.p;
  p.dim = call.dim;
  p.n_pairs = n;
  p.n_tiles = n_tiles;
  p.tile_pairs = tile_pairs;
  p.examples = examples_of(static_cast<uint64_t>(call.columns));
  p.dlogit = dlogit.const_data_ptr();
  p.grad_loss = grad_loss.const_data_ptr();
  p.grad_loss_stride = grad_loss.stride(0);
  p.hidden = hidden.const_data_ptr();
  p.hidden_stride = hidden.stride(0);
  p.by_class = by_class;
  p.partial_rows = work.partial_rows.mutable_data_ptr();
  p.partial_bias = work.partial_bias.mutable_data_ptr();
  if (n == 0) return work;

  const Tensor numbers = torch::stable::new_empty(ids, {n}, ScalarType::Int);
  static Occupancy numbering;
  launch_persistent(number_pairs_kernel, (n + kThreads - 1) / kThreads, kThreads, 0, device, numbering,
                    data_of<uint32_t>(numbers), n);
  const auto* unsorted = static_cast<const uint32_t*>(ids.const_data_ptr());
  auto* sorted = data_of<uint32_t>(work.classes);
  auto* order = data_of<uint32_t>(work.pairs);
  const int bits = sorted_bits(n_classes);
  size_t bytes = 0;
  const auto sort = [&](void* memory) {
    return cub::DeviceRadixSort::SortPairs(memory, bytes, unsorted, sorted, data_of<uint32_t>(numbers), order, n, 0,
                                           bits, device.stream());
  };
  check_cuda(sort(nullptr), "radix sort");
  check_cuda(sort(scratch(ids, bytes).mutable_data_ptr()), "radix sort");
  p.classes = sorted;
  p.pairs = order;

  if (by_class) return work;
  auto* counts = data_of<uint32_t>(work.counts);
  static Occupancy counting;
  constexpr int kTilesPerBlock = kThreads / kWarp;
  launch_persistent(count_segments_kernel, n_tiles / kTilesPerBlock + 1, kThreads, 0, device, counting, p, counts);
  const auto sum = [&](void* memory) {
    return cub::DeviceScan::ExclusiveSum(memory, bytes, counts, counts, n_tiles + 1, device.stream());
  };
  check_cuda(sum(nullptr), "exclusive sum");
  check_cuda(sum(scratch(ids, bytes).mutable_data_ptr()), "exclusive sum");
  p.segments_before = counts;
  return work;
}

void list_segments(const RowGradTiles& p, int64_t n_rows, const OnDevice& device) {
  static Occupancy listing;
  constexpr int kTilesPerBlock = kThreads / kWarp;
  launch_persistent(list_segments_kernel, (p.n_tiles + kTilesPerBlock - 1) / kTilesPerBlock, kThreads, 0, device,
                    listing, p, n_rows);
}

namespace {

// The number of segments, for which the host has to wait.
int64_t count_segments(const RowGradWork& work, const OnDevice& device) {
  if (work.call.n_pairs == 0) return 0;
  uint32_t count = 0;
  check_cuda(cudaMemcpyAsync(&count, work.p.segments_before + work.p.n_tiles, sizeof count, cudaMemcpyDeviceToHost,
                             device.stream()),
             "copy of the number of rows");
  check_cuda(cudaStreamSynchronize(device.stream()), "wait for the number of rows");
  return count;
}

std::tuple<Tensor, Tensor, Tensor> row_grad(const PairArguments& pairs, const RowGradArguments& gradient, bool padded) {
  const auto& [n_classes, dtype, with_rows, with_bias] = gradient;
  const OnDevice device(pairs.hidden);
  RowGradWork work = sort_row_grad(pairs, n_classes, dtype, with_rows, false, device);
  const int64_t n_rows = padded ? padded_rows(work.call) : count_segments(work, device);
  Tensor classes = torch::stable::new_empty(pairs.ids, {n_rows}, ScalarType::Long);
  Tensor rows = torch::stable::new_empty(pairs.hidden, {with_rows ? n_rows : 0, work.call.dim}, dtype);
  Tensor bias = torch::stable::new_empty(pairs.hidden, {with_bias ? n_rows : 0}, dtype);
  work.p.segment_class = data_of<int64_t>(classes);
  if (with_rows) work.p.rows = rows.mutable_data_ptr();
  if (with_bias) work.p.bias = bias.mutable_data_ptr();
  sum_segments(work.p, work.call, device);
  if (padded) clear_spare_rows(work.p, work.call.storage, n_rows, device);
  return {classes, rows, bias};
}

std::tuple<Tensor, Tensor> row_grad_dense(const PairArguments& pairs, const RowGradArguments& gradient) {
  const auto& [n_classes, dtype, with_rows, with_bias] = gradient;
  const OnDevice device(pairs.hidden);
  RowGradWork work = sort_row_grad(pairs, n_classes, dtype, with_rows, true, device);
  Tensor rows = torch::stable::new_zeros(pairs.hidden, {with_rows ? n_classes : 0, work.call.dim}, dtype);
  Tensor bias = torch::stable::new_zeros(pairs.hidden, {with_bias ? n_classes : 0}, dtype);
  if (with_rows) work.p.rows = rows.mutable_data_ptr();
  if (with_bias) work.p.bias = bias.mutable_data_ptr();
  sum_segments(work.p, work.call, device);
  return {rows, bias};
}

}  // namespace
}  // namespace nce::cuda

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CUDA, m) {
  m.impl("row_grad", TORCH_BOX(&nce::Operator<&nce::cuda::row_grad>::call));
  m.impl("row_grad_dense", TORCH_BOX(&nce::Operator<&nce::cuda::row_grad_dense>::call));
}
