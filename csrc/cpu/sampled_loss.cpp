// Entry point of the fused forward pass: checks, outputs, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "../check.h"
#include "kernels.h"

namespace nce {
namespace {

constexpr int64_t kGrainBytes = 32 * 1024;  // of candidate rows: a thread gets at least a few microseconds of work

const void* data_or_null(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// Distance between examples of a tensor that holds one row per example or one for all; its rows are contiguous.
int64_t shared_stride(const char* name, const Tensor& t, int64_t batch, int64_t n) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(0) == batch || t.size(0) == 1) && t.size(1) == n, name, " must have shape [",
                  batch, " or 1, ", n, "], got ", shape_of(t));
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  return t.size(0) == 1 ? 0 : n;
}

// The kernel has found a pair with an unusable id; nothing that it wrote has left this file.
void refuse_pair(const SampledLoss& p, int64_t pair) {
  const int64_t columns = p.n_targets + p.n_negatives, example = pair / columns, column = pair % columns;
  const bool positive = column < p.n_targets;
  const int64_t id = positive ? p.target[example * p.n_targets + column]
                              : p.negatives[example * p.negatives_stride + column - p.n_targets];
  const char* name = positive ? "target" : "negatives";
  STD_TORCH_CHECK(id >= 0 && id < p.n_classes, name, " must be in 0 .. ", p.n_classes - 1, ", got ", id,
                  " for example ", example);
  STD_TORCH_CHECK(false, name, " must be classes with a finite log q, got class ", id, " for example ", example);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sampled_loss(
    Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor target, std::optional<Tensor> log_z,
    std::optional<Tensor> seed, Tensor table, std::optional<Tensor> negatives, std::optional<Tensor> target_log_q,
    std::optional<Tensor> negative_log_q, int64_t kind, int64_t num_negatives, bool subtract_log_q, double offset,
    bool remove_hits, bool uniform_labels, bool mean_candidates, int64_t ignore_index, bool needs_hidden_grad,
    bool needs_row_grad, bool /*sparse: for the backward pass*/) {
  SampledLoss p{};
  const Storage storage = storage_of("weight", weight);
  const ScalarType compute = compute_type(storage);
  p.hidden_storage = storage_of("hidden", hidden);
  STD_TORCH_CHECK((p.hidden_storage == Storage::kDouble) == (storage == Storage::kDouble),
                  "hidden and weight must both be float64 or neither");
  check_rows("hidden", hidden);
  check_rows("weight", weight);
  p.batch = hidden.size(0);
  p.dim = weight.size(1);
  p.n_classes = weight.size(0);
  STD_TORCH_CHECK(hidden.size(1) == p.dim, "hidden must have ", p.dim, " columns, got ", hidden.size(1));
  p.hidden = hidden.const_data_ptr();
  p.hidden_stride = hidden.stride(0);
  p.weight = weight.const_data_ptr();
  p.weight_stride = weight.stride(0);
  if (bias) {
    check_dtype("bias", *bias, weight.scalar_type());
    check_shape("bias", *bias, {p.n_classes});
    STD_TORCH_CHECK(bias->is_contiguous(), "bias must be contiguous");
    p.bias = bias->const_data_ptr();
  }

  check_dtype("target", target, ScalarType::Long);
  STD_TORCH_CHECK(target.dim() == 2 && target.size(0) == p.batch && target.is_contiguous(),
                  "target must be contiguous of shape [", p.batch, ", T], got ", shape_of(target));
  p.target = static_cast<const int64_t*>(target.const_data_ptr());
  p.n_targets = target.size(1);
  STD_TORCH_CHECK(num_negatives >= 0, "num_negatives must be >= 0, got ", num_negatives);
  p.n_negatives = num_negatives;
  const int64_t columns = p.n_targets + p.n_negatives;
  STD_TORCH_CHECK(columns < (int64_t{1} << 32) && p.batch < (int64_t{1} << 32) &&
                      static_cast<double>(p.batch) * static_cast<double>(columns) < 0x1p32,
                  "hidden must have fewer than 2^32 / (k + T) rows, got ", p.batch);
  if (log_z) {
    check_dtype("log_z", *log_z, compute);
    check_shape("log_z", *log_z, {p.batch});
    p.log_z = log_z->const_data_ptr();
    p.log_z_stride = log_z->stride(0);
  }

  p.noise = noise_of(kind, p.n_classes, table);
  STD_TORCH_CHECK(seed || negatives, "seed must be given where negatives are not");
  if (seed) p.seed = seed_of(*seed);
  if (negatives) {
    check_dtype("negatives", *negatives, ScalarType::Long);
    p.negatives_stride = shared_stride("negatives", *negatives, p.batch, num_negatives);
    p.negatives = static_cast<const int64_t*>(negatives->const_data_ptr());
  }
  STD_TORCH_CHECK(!negative_log_q || negatives, "negative_log_q must come with negatives");
  if (target_log_q) {
    check_dtype("target_log_q", *target_log_q, compute);
    check_shape("target_log_q", *target_log_q, {p.batch, p.n_targets});
    STD_TORCH_CHECK(target_log_q->is_contiguous(), "target_log_q must be contiguous");
  }
  if (negative_log_q) {
    check_dtype("negative_log_q", *negative_log_q, compute);
    p.negative_log_q_stride = shared_stride("negative_log_q", *negative_log_q, p.batch, num_negatives);
  }
  p.target_log_q = data_or_null(target_log_q);
  p.negative_log_q = data_or_null(negative_log_q);
  p.subtract_log_q = subtract_log_q;
  p.offset = offset;
  p.remove_hits = remove_hits;
  p.uniform_labels = uniform_labels;
  p.mean_candidates = mean_candidates;
  p.ignore_index = ignore_index;

  const int64_t saved = needs_row_grad ? p.batch : 0;
  Tensor loss = torch::stable::new_empty(weight, {p.batch}, compute);
  Tensor ids = torch::stable::new_empty(weight, {saved, columns}, ScalarType::Int);
  Tensor dlogit = torch::stable::new_empty(weight, {saved, columns}, compute);
  Tensor grad_hidden = torch::stable::new_empty(weight, {needs_hidden_grad ? p.batch : 0, p.dim}, compute);
  p.loss = loss.mutable_data_ptr();
  if (needs_row_grad) {
    p.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
    p.dlogit = dlogit.mutable_data_ptr();
  }
  if (needs_hidden_grad) p.grad_hidden = grad_hidden.mutable_data_ptr();

  const auto kernel = kernels().sampled_loss[static_cast<int>(storage)];
  const int64_t row_bytes = p.dim * (compute == ScalarType::Double ? 8 : 4);
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, columns * row_bytes));
  std::atomic<int64_t> bad_pair{-1};
  torch::stable::parallel_for(0, p.batch, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * padded_dim(p.dim));
    const int64_t bad = kernel(p, begin, end, scratch.get());
    if (bad >= 0) bad_pair = bad;
  });
  if (bad_pair >= 0) refuse_pair(p, bad_pair);
  return {loss, ids, dlogit, grad_hidden};
}

}  // namespace
}  // namespace nce

STABLE_TORCH_LIBRARY_IMPL(nce_ext, CPU, m) { m.impl("sampled_loss", TORCH_BOX(&nce::sampled_loss)); }
