// The epilogue between the matrix products of shared negatives: scores of the targets, the objective, and derivatives
// in the place of the logits. A block works on one example at a time.
#pragma once

#include "shared_columns.cuh"

namespace nce::cuda {

// Warps for examples of that size. No result depends on anything else of a launch.
inline int shared_loss_warps(const SharedLoss& p) {
  constexpr int64_t kOfLane = 16;
  const int64_t longest = p.n_columns > p.dim ? p.n_columns : p.dim;
  int warps = 1;
  while (warps < kSharedWarps && warps * kWarp * kOfLane < longest) warps *= 2;
  return warps;
}

template <class Stored>
struct SharedLossBlock : SharedColumns<Compute<Stored>> {
  using Columns = SharedColumns<Compute<Stored>>;
  using Real = Compute<Stored>;
  using Columns::p, Columns::lane, Columns::warp, Columns::thread, Columns::n_threads, Columns::n_columns;
  using Columns::shared, Columns::example, Columns::factor, Columns::kWide, Columns::target, Columns::sum_of_warps;
  static constexpr int kPer = kPerVector<Stored>;

  __device__ __forceinline__ bool wide_weight() const {
    return reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 &&
           p.weight_stride * static_cast<int64_t>(sizeof(Stored)) % 16 == 0 && p.dim % kPer == 0;
  }

  __device__ __forceinline__ void target_row(int64_t t, int first, Real* out) const {
    const Stored* row = static_cast<const Stored*>(p.weight) + target(t) * p.weight_stride;
    load_elements_of<kPer>(row, first, static_cast<int>(p.dim), wide_weight(), out);
  }

  // <hidden, row of target t>, in all threads.
  __device__ __forceinline__ Real target_dot(int64_t t, Real* partial) const {
    const int dim = static_cast<int>(p.dim);
    const bool wide = wide_rows(p.hidden, p.hidden_stride, p.dim, p.hidden_storage, kPer);
    Real dot = Real(0);
#pragma unroll 2
    for (int first = thread * kPer; first < dim; first += n_threads * kPer) {
      Real x[kPer], w[kPer];
      load_elements<kPer>(p.hidden, example * p.hidden_stride, p.hidden_storage, first, dim, wide, x);
      target_row(t, first, w);
#pragma unroll
      for (int e = 0; e < kPer; ++e) dot = multiply_add(x[e], w[e], dot);
    }
    dot = warp_sum(dot);
    if (lane == 0) partial[warp] = dot;
    __syncthreads();
    return sum_of_warps(partial);
  }

  // Without a target the loss is 0, with a bad one NaN; neither has derivatives.
  __device__ __forceinline__ void skip(bool bad) const {
    if (thread == 0) static_cast<Real*>(p.loss)[example] = bad ? static_cast<Real>(NAN) : Real(0);
    if (!p.needs_derivatives) return;
    const Real zeros[kWide] = {};
#pragma unroll 1
    for (uint32_t first = this->first_column(); first < n_columns; first += this->step()) {
      this->write(first, this->wide_logits(), zeros);
    }
#pragma unroll 1
    for (int64_t t = thread; t < p.n_targets; t += n_threads) {
      p.target_ids[example * p.n_targets + t] = -1;
      static_cast<Real*>(p.target_dlogit)[example * p.n_targets + t] = Real(0);
    }
    if (thread == 0 && p.grad_shift) static_cast<Real*>(p.grad_shift)[example] = Real(0);
    if (p.grad_hidden) {
#pragma unroll 1
      for (int64_t d = thread; d < p.dim; d += n_threads) {
        static_cast<Real*>(p.grad_hidden)[example * p.dim + d] = Real(0);
      }
    }
  }

  // The derivative of target t, whose score stands in target_dlogit.
  __device__ __forceinline__ Real target_derivative(int64_t t, const Normaliser<Real>& n, Real label) const {
    if (target(t) == p.ignore_index) return Real(0);
    const Real z = static_cast<const Real*>(p.target_dlogit)[example * p.n_targets + t];
    if (p.objective.kind == ObjectiveKind::kSoftmax) return factor * softmax_target_dlogit(n, z);
    return factor * static_cast<Real>(p.objective.positive_weight) * binary_column(z, label).dlogit;
  }

  // The targets' part of the gradient of hidden.
  __device__ __forceinline__ void write_gradient(const Normaliser<Real>& n, Real label) const {
    Real* out = static_cast<Real*>(p.grad_hidden) + example * p.dim;
    const int dim = static_cast<int>(p.dim);
#pragma unroll 2
    for (int first = thread * kPer; first < dim; first += n_threads * kPer) {
      Real sum[kPer] = {};
#pragma unroll 1
      for (int64_t t = 0; t < p.n_targets; ++t) {
        const Real d = target_derivative(t, n, label);
        if (target(t) == p.ignore_index) continue;
        Real w[kPer];
        target_row(t, first, w);
#pragma unroll
        for (int e = 0; e < kPer; ++e) sum[e] = multiply_add(d, w[e], sum[e]);
      }
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        if (first + e < dim) out[first + e] = sum[e];
      }
    }
  }

  __device__ __forceinline__ void run(int64_t of_example) {
    example = of_example;
    int64_t n_positive = 0;
    bool bad = false;
    const Real* log_q = p.target_log_q ? static_cast<const Real*>(p.target_log_q) + example * p.n_targets : nullptr;
#pragma unroll 1
    for (int64_t t = 0; t < p.n_targets; ++t) {
      if (target(t) == p.ignore_index) continue;
      ++n_positive;
      bad |= static_cast<uint64_t>(target(t)) >= static_cast<uint64_t>(p.n_classes);
      if (log_q) bad |= !(log_q[t] - log_q[t] == Real(0));  // infinite or NaN
    }
    if (n_positive == 0 || bad) return skip(bad);

    const Real scale = p.mean_candidates ? Real(1) / static_cast<Real>(n_positive + p.n_draws) : Real(1);
    const Real label = p.uniform_labels ? Real(1) / static_cast<Real>(n_positive) : Real(1);
    factor = p.example_weight ? scale * static_cast<const Real*>(p.example_weight)[example] : scale;
    const Real log_z = p.log_z ? static_cast<const Real*>(p.log_z)[example * p.log_z_stride] : Real(0);
    this->begin(log_z);

    ExampleSums<Real> sums = no_columns<Real>();
    Real log_not_target = Real(0);
    int buffer = 0;
#pragma unroll 1
    for (int64_t t = 0; t < p.n_targets; ++t) {
      if (target(t) == p.ignore_index) continue;
      Real z = target_dot(t, shared.dot[buffer]);
      buffer ^= 1;  // the barrier of the next target comes before anyone writes to this one again
      Real q = log_q ? log_q[t] : Real(0);
      if (!p.objective.correct_positive) {
        log_not_target = log_rest(q);
        q = Real(0);
      }
      if (p.bias) z += static_cast<Real>(widen(static_cast<const Stored*>(p.bias)[target(t)]));
      z = clamp_finite(z - (q + (static_cast<Real>(p.offset) + log_z)));
      if (p.objective.kind == ObjectiveKind::kSoftmax) {
        add(sums.targets, z);
        sums.target_score += z;
      } else {
        sums.target_loss += static_cast<Real>(p.objective.positive_weight) * binary_column(z, label).loss;
      }
      if (thread == 0 && p.needs_derivatives) {
        static_cast<Real*>(p.target_dlogit)[example * p.n_targets + t] = z;
      }
    }

    Normaliser<Real> n{};
    Real loss = Real(0), derivatives;
    const bool whole = p.objective.kind != ObjectiveKind::kBinary;
    if (whole) {
      derivatives = this->whole_columns(sums, n_positive, log_not_target, n);
      if (!p.needs_derivatives) return;
    } else {
      derivatives = this->binary_columns(loss);
      __syncthreads();  // for the scores of targets
    }
    if (p.grad_hidden) write_gradient(n, label);
    loss = warp_sum(loss);
    derivatives = warp_sum(derivatives);
    if (lane == 0) {
      shared.loss[warp] = loss;
      shared.derivatives[warp] = derivatives;
    }
    __syncthreads();  // from here on nobody needs the scores of targets but thread 0
    if (thread != 0) return;
    if (!whole) static_cast<Real*>(p.loss)[example] = scale * (sum_of_warps(shared.loss) + sums.target_loss);
    if (!p.needs_derivatives) return;
    derivatives = sum_of_warps(shared.derivatives);
#pragma unroll 1
    for (int64_t t = 0; t < p.n_targets; ++t) {
      const Real d = target_derivative(t, n, label);
      p.target_ids[example * p.n_targets + t] = target(t) == p.ignore_index ? -1 : static_cast<int32_t>(target(t));
      static_cast<Real*>(p.target_dlogit)[example * p.n_targets + t] = d;
      derivatives += d;
    }
    if (p.grad_shift) static_cast<Real*>(p.grad_shift)[example] = derivatives;
  }
};

template <class Stored>
__global__ void __launch_bounds__(kSharedWarps* kWarp, sizeof(Stored) == 8 ? 2 : 3)
    shared_loss_kernel(const __grid_constant__ SharedLoss p) {
  SharedLossBlock<Stored> block{{p}};
  for (int64_t example = blockIdx.x; example < p.batch; example += gridDim.x) block.run(example);
}

}  // namespace nce::cuda
