// Entry points of the row gradient that is never in memory: steps of an optimizer, and the gradient's norm. They wait
// for nothing.
#include "row_grad_step.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "row_grad_launch.cuh"
#include "row_step_launch.cuh"

namespace nce::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

void fill(const Tensor& t, int value, int64_t bytes, const OnDevice& device) {
  if (bytes == 0) return;
  check_cuda(cudaMemsetAsync(t.mutable_data_ptr(), value, static_cast<size_t>(bytes), device.stream()), "memset");
}

template <class Stored, class Hidden, Access kAccess>
void launch_steps(const SegmentSteps& p, const StepSlices& slices, const OnDevice& device) {
  constexpr int64_t kStepWarps = kStepThreads / kWarp;
  static Occupancy summing, joining;
  launch_persistent(segment_steps_kernel<Stored, Hidden, kAccess>,
                    (p.tiles.n_tiles * slices.sums + kStepWarps - 1) / kStepWarps, kStepThreads, 0, device, summing, p,
                    static_cast<int>(slices.sums));
  launch_persistent(join_steps_kernel<Stored>, (p.tiles.n_tiles * slices.joins + kJoinWarps - 1) / kJoinWarps,
                    kJoinWarps * kWarp, join_shared_bytes<Stored>(), device, joining, p,
                    static_cast<int>(slices.joins));
}

void sum_into_steps(const SegmentSteps& p, Storage storage, Storage hidden_storage, const OnDevice& device) {
  const StepSlices slices = step_slices(p.tiles.dim, p.tiles.rows != nullptr, hidden_storage);
  with_stored(storage, [&](auto stored) {
    with_stored(hidden_storage, [&](auto hidden) {
      using Stored = decltype(stored);
      using Hidden = decltype(hidden);
      if constexpr ((sizeof(Stored) == 8) == (sizeof(Hidden) == 8)) {  // refused before
        constexpr Access kNarrow = sizeof(Hidden) == 8 ? Access::kBytes8 : Access::kElements;
        if (step_access<Hidden>(p, storage) == Access::kBytes16) {
          launch_steps<Stored, Hidden, Access::kBytes16>(p, slices, device);
        } else {
          launch_steps<Stored, Hidden, kNarrow>(p, slices, device);
        }
      }
    });
  });
}

Tensor cleared_squares(SegmentSteps& p, Storage hidden_storage, const Tensor& like, const OnDevice& device) {
  p.n_squares = step_slices(p.tiles.dim, p.tiles.rows != nullptr, hidden_storage).most();
  const Tensor squares = torch::stable::new_empty(like, {p.n_rows, p.n_squares}, ScalarType::Double);
  fill(squares, 0, p.n_rows * p.n_squares * 8, device);
  p.squares = static_cast<double*>(squares.mutable_data_ptr());
  return squares;
}

std::tuple<Tensor, Tensor> run_row_grad_step(const RowGradStepCall& call) {
  const OnDevice device(call.pairs.hidden);
  SegmentSteps p{};
  p.step = call.step;
  const ScalarType dtype = call.weight.scalar_type();
  const RowGradWork work = sort_row_grad(call.pairs, p.step.n_rows, dtype,
                                         /*with_rows=*/true, /*by_class=*/false, device);
  const Storage storage = work.call.storage, hidden_storage = work.call.hidden_storage;
  p.n_rows = padded_rows(work.call);
  Tensor classes = torch::stable::new_empty(call.pairs.ids, {p.n_rows}, ScalarType::Long);
  Tensor bias = torch::stable::new_empty(call.pairs.hidden, {call.with_bias ? p.n_rows : 0}, dtype);
  if (p.n_rows == 0) return {classes, bias};
  fill(classes, 0xFF, p.n_rows * 8, device);  // -1
  if (call.with_bias) fill(bias, 0, p.n_rows * bytes_of(storage), device);
  p.tiles = work.p;
  p.tiles.segment_class = static_cast<int64_t*>(classes.mutable_data_ptr());
  p.tiles.rows = p.step.weight;
  if (call.with_bias) p.tiles.bias = bias.mutable_data_ptr();
  list_segments(p.tiles, p.n_rows, device);
  const Settled settled = settle_rows(p.step, storage, p.tiles.segment_class, p.n_rows, call.weight, device);
  p.settled = settled.memory.const_data_ptr();
  p.settled_each = settled.each;
  if (p.step.rule == StepRule::kRowwiseAdagrad) {
    p.pass = Pass::kSquares;
    const Tensor squares = cleared_squares(p, hidden_storage, call.pairs.hidden, device);
    sum_into_steps(p, storage, hidden_storage, device);
    static Occupancy adding[2];
    const int64_t blocks = (p.n_rows + kThreads - 1) / kThreads;
    if (storage == Storage::kDouble) {
      launch_persistent(add_squares_kernel<double>, blocks, kThreads, 0, device, adding[1], p);
    } else {
      launch_persistent(add_squares_kernel<float>, blocks, kThreads, 0, device, adding[0], p);
    }
  }
  p.pass = Pass::kStep;
  sum_into_steps(p, storage, hidden_storage, device);
  return {classes, bias};
}

Tensor row_grad_norm(const PairArguments& pairs, int64_t n_classes, bool with_rows, bool with_bias) {
  const Tensor& hidden = pairs.hidden;
  const OnDevice device(hidden);
  const Storage hidden_storage = storage_of("hidden", hidden);
  const RowGradWork work = sort_row_grad(pairs, n_classes, compute_type(hidden_storage), with_rows,
                                         /*by_class=*/false, device);
  Tensor total = torch::stable::new_empty(hidden, {1}, ScalarType::Double);
  SegmentSteps p{};
  p.pass = Pass::kNorm;
  p.n_rows = padded_rows(work.call);
  if (p.n_rows == 0 || (!with_rows && !with_bias)) {
    fill(total, 0, 8, device);
    return total;
  }
  p.tiles = work.p;
  p.tiles.rows = with_rows ? p.tiles.partial_rows : nullptr;
  p.step.dim = p.tiles.dim;
  p.norm_of_bias = with_bias;
  const Tensor squares = cleared_squares(p, hidden_storage, hidden, device);
  sum_into_steps(p, work.call.storage, hidden_storage, device);
  const Tensor parts = torch::stable::new_empty(hidden, {kNormParts}, ScalarType::Double);
  auto* sums = static_cast<double*>(parts.mutable_data_ptr());
  static Occupancy adding;
  launch_persistent(sum_parts_kernel, kNormParts / kWarps, kThreads, 0, device, adding, p.squares,
                    p.n_rows * p.n_squares, kNormParts, sums);
  launch_persistent(sum_parts_kernel, 1, kThreads, 0, device, adding, sums, kNormParts, int64_t{1},
                    static_cast<double*>(total.mutable_data_ptr()));
  return total;
}

}  // namespace
}  // namespace nce::cuda

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CUDA, m) {
  m.impl("row_grad_step_", TORCH_BOX(&nce::Operator<&nce::row_grad_step_<nce::cuda::run_row_grad_step>>::call));
  m.impl("row_grad_norm", TORCH_BOX(&nce::Operator<&nce::cuda::row_grad_norm>::call));
}
