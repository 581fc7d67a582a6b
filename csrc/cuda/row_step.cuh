// Steps of an optimizer on rows of a table: see row_step.h for the rules.
//
// The numbers that all elements of a row share are settled first, by one thread for each row, which moves the row's
// counters on as well. Kernels that walk elements then read no counter, whatever other threads work on the same row.
#pragma once

#include "../row_step.h"
#include "pack.cuh"

namespace nce::cuda {

// Threads of a block at most, in kernels that step. These are compiled for 4 blocks on a multiprocessor: they then
// spill nothing, while without that bound the compiler chose fewer registers, and spilled.
constexpr int kStepThreads = 128;

template <class Real>
struct alignas(16) SettledRow {
  RowNumbers<Real> numbers;
};

// Whether rows differ in their numbers; else there is one SettledRow for all.
inline bool rows_differ(const RowStep& p) { return p.row_steps != nullptr || p.decayed != nullptr; }

__device__ __forceinline__ bool has_row(const RowStep& p, int64_t row) { return row >= 0 && row < p.n_rows; }

// Settles rows classes[0] .. classes[n - 1], or 0 .. n - 1 if classes is null. A class that is no row is left out.
template <class Real>
__global__ void __launch_bounds__(256, 4) settle_rows_kernel(const __grid_constant__ RowStep p, const int64_t* classes,
                                                             int64_t n, SettledRow<Real>* settled) {
  const int64_t n_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += n_threads) {
    const int64_t row = classes ? classes[i] : i;
    if (!has_row(p, row)) continue;
    settled[i].numbers = numbers_of<Real>(p, row);
    count_touch(p, row);
  }
}

template <class Real>
__device__ __forceinline__ RowNumbers<Real> settled_numbers(const SettledRow<Real>* settled) {
  Vector words[sizeof(SettledRow<Real>) / 16];
#pragma unroll
  for (size_t i = 0; i < sizeof(SettledRow<Real>) / 16; ++i) {
    words[i] = read_once16(reinterpret_cast<const char*>(settled) + 16 * i);
  }
  RowNumbers<Real> numbers;
  std::memcpy(&numbers, words, sizeof numbers);
  return numbers;
}

// Whether steps can read and write runs of `count` elements, aligned in their row, by vectors.
inline bool wide_steps(const RowStep& p, Storage storage, int count) {
  const auto aligned = [](const void* base) { return reinterpret_cast<uintptr_t>(base) % 16 == 0; };
  return p.dim % count == 0 && aligned(p.weight) && p.weight_stride * bytes_of(storage) % 16 == 0 && aligned(p.first) &&
         (p.rule == StepRule::kRowwiseAdagrad || aligned(p.second)) && aligned(p.master);
}

// Loads elements first, first + kApart, ... of a row, zero beyond dim; first < dim. No other thread may be writing
// them.
template <int kCount, bool kWide, int kApart, class T, class Real>
__device__ __forceinline__ void load_run(const T* row, int first, int dim, Real* out) {
  static_assert(!kWide || kApart == 1);
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  if constexpr (kWide && kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const auto part = unpack<T>(read16(row + first + i * kPerVector<T>));
#pragma unroll
      for (int e = 0; e < kPerVector<T>; ++e) out[i * kPerVector<T> + e] = static_cast<Real>(part.element[e]);
    }
  } else if constexpr (kWide) {
    load_elements_of<kCount>(row, first, dim, true, out);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      out[e] = first + e * kApart < dim ? static_cast<Real>(widen(row[first + e * kApart])) : Real(0);
    }
  }
}

template <int kCount, bool kWide, int kApart, class T>
__device__ __forceinline__ void store_run(T* row, int first, int dim, const T* values) {
  if constexpr (kWide) {
    store_elements_of<kCount, true>(row, first, dim, values);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (first + e * kApart < dim) row[first + e * kApart] = values[e];
    }
  }
}

// The step of kCount elements of a row, kApart from each other, of which a thread has the gradient.
template <class Stored, int kCount, bool kWide, int kApart = 1>
struct ElementSteps {
  using Real = Compute<Stored>;
  const RowStep& p;
  const int64_t row;
  const int first;
  const int dim = static_cast<int>(p.dim);

  __device__ __forceinline__ Stored* stored_row() const {
    return static_cast<Stored*>(p.weight) + row * p.weight_stride;
  }

  __device__ __forceinline__ void load_weights(Real* out) const {
    if constexpr (sizeof(Stored) == 2) {
      if (p.master) return load_run<kCount, kWide, kApart>(p.master + row * p.dim, first, dim, out);
    }
    load_run<kCount, kWide, kApart>(stored_row(), first, dim, out);
  }

  __device__ __forceinline__ void round_at_random(const Real* weights, Stored* out) const {
    if constexpr (sizeof(Stored) == 2) {
      const Seed seed = read_seed(p.seed, p.seed_stride);
      Words words;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const int d = first + e * kApart;
        if (e == 0 || kApart > 1) words = rounding_words(seed, row, d);
        const uint32_t random = rounding_bits(words, kCount == 8 ? e : d % 8);
        if constexpr (std::is_same_v<Stored, BFloat16>) {
          out[e].bits = round_to_bfloat16(weights[e], random);
        } else {
          out[e].bits = round_to_half(weights[e], random);
        }
      }
    }
  }

  __device__ __forceinline__ void store_weights(const Real* weights) const {
    Stored out[kCount];
    if (sizeof(Stored) == 2 && p.seed && !p.master) {
      round_at_random(weights, out);
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) narrow(weights[e], out + e);
    }
    if constexpr (sizeof(Stored) == 2) {
      if (p.master) store_run<kCount, kWide, kApart>(p.master + row * p.dim, first, dim, weights);
    }
    store_run<kCount, kWide, kApart>(stored_row(), first, dim, out);
  }

  // Sum of the squares of this lane's elements.
  __device__ __forceinline__ double squares_of(const Real* gradient) const {
    double sum = 0;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const auto g = static_cast<double>(gradient[e]);
      if (first + e * kApart < dim) sum += g * g;
    }
    return sum;
  }

  // Sum of the squares of what the step sees of the gradient: scaled, with the coupled decay.
  __device__ __forceinline__ double squares(const RowNumbers<Real>& n, const Real* gradient) const {
    if (first >= dim) return 0;
    Real g[kCount];
    load_weights(g);
#pragma unroll
    for (int e = 0; e < kCount; ++e) g[e] = step_gradient(n, gradient[e], g[e]);
    return squares_of(g);
  }

  template <StepRule kRule>
  __device__ __forceinline__ void step_all(const RowNumbers<Real>& n, const Real* gradient, Real* weight, Real* a,
                                           Real* b) const {
#pragma unroll
    for (int e = 0; e < kCount; ++e) step_element<kRule>(n, gradient[e], weight[e], a[e], b[e]);
  }

  // Takes the step. row_second: row-wise Adagrad's new sum of squares of the row.
  __device__ __forceinline__ void step(const RowNumbers<Real>& n, const Real* gradient, Real row_second) const {
    if (first >= dim) return;
    const bool has_second = p.second && p.rule != StepRule::kRowwiseAdagrad;
    auto* firsts = static_cast<Real*>(p.first) + row * p.dim;
    auto* seconds = static_cast<Real*>(p.second) + row * p.dim;
    Real weight[kCount], a[kCount], b[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      a[e] = Real(0);
      b[e] = row_second;
    }
    load_weights(weight);
    if (p.first) load_run<kCount, kWide, kApart>(firsts, first, dim, a);
    if (has_second) load_run<kCount, kWide, kApart>(seconds, first, dim, b);
    switch (p.rule) {
      case StepRule::kSgd:
        step_all<StepRule::kSgd>(n, gradient, weight, a, b);
        break;
      case StepRule::kAdagrad:
        step_all<StepRule::kAdagrad>(n, gradient, weight, a, b);
        break;
      case StepRule::kRowwiseAdagrad:
        step_all<StepRule::kRowwiseAdagrad>(n, gradient, weight, a, b);
        break;
      case StepRule::kAdam:
        step_all<StepRule::kAdam>(n, gradient, weight, a, b);
        break;
    }
    if (p.first) store_run<kCount, kWide, kApart>(firsts, first, dim, a);
    if (has_second) store_run<kCount, kWide, kApart>(seconds, first, dim, b);
    store_weights(weight);
  }
};

// Parameters of steps on rows whose gradient lies in memory, in the weight's storage.
struct RowSteps {
  RowStep step;
  int64_t n;
  const int64_t* classes;  // [n], or null: rows 0 .. n - 1
  const void* gradient;
  int64_t gradient_stride;
  const void* settled;  // SettledRow
  bool settled_each;    // [n] of them; else one
};

// Number of lanes that share a row.
inline int step_group(int64_t dim, int per_lane) {
  const int64_t lanes = (dim + per_lane - 1) / per_lane;
  return lanes <= 8 ? 8 : lanes <= 16 ? 16 : kWarp;
}

template <class Stored>
bool wide_row_step(const RowSteps& p, Storage storage) {
  return wide_steps(p.step, storage, kPerVector<Stored>) && reinterpret_cast<uintptr_t>(p.gradient) % 16 == 0 &&
         p.gradient_stride * static_cast<int64_t>(sizeof(Stored)) % 16 == 0;
}

template <class Stored, bool kWide>
__global__ void __launch_bounds__(kStepThreads, 4) row_step_kernel(const __grid_constant__ RowSteps p, int group) {
  using Real = Compute<Stored>;
  constexpr int kPer = kPerVector<Stored>;
  using Elements = ElementSteps<Stored, kPer, kWide>;
  const int lane = threadIdx.x % kWarp, in_group = lane & (group - 1), each = kWarp / group;
  const int dim = static_cast<int>(p.step.dim);
  const int64_t n_warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  for (int64_t begin = (blockIdx.x * (blockDim.x / kWarp) + warp_of_block()) * static_cast<int64_t>(each); begin < p.n;
       begin += n_warps * each) {
    const int64_t i = begin + lane / group;
    const int64_t row = i >= p.n ? -1 : p.classes ? p.classes[i] : i;
    const bool live = has_row(p.step, row);
    const auto* gradient = static_cast<const Stored*>(p.gradient) + i * p.gradient_stride;
    RowNumbers<Real> numbers{};
    if (live) numbers = settled_numbers(static_cast<const SettledRow<Real>*>(p.settled) + (p.settled_each ? i : 0));
    Real row_second = Real(0);
    if (p.step.rule == StepRule::kRowwiseAdagrad) {
      double square = 0;
      for (int first = in_group * kPer; live && first < dim; first += group * kPer) {
        Real g[kPer];
        load_run<kPer, kWide, 1>(gradient, first, dim, g);
        square += Elements{p.step, row, first}.squares(numbers, g);
      }
      for (int offset = group / 2; offset > 0; offset /= 2) square += __shfl_xor_sync(kAllLanes, square, offset);
      if (live && in_group == 0) {
        Real* second = static_cast<Real*>(p.step.second) + row;
        *second = row_second = *second + static_cast<Real>(square / static_cast<double>(dim));
      }
      row_second = __shfl_sync(kAllLanes, row_second, lane - in_group);
    }
    for (int first = in_group * kPer; live && first < dim; first += group * kPer) {
      Real g[kPer];
      load_run<kPer, kWide, 1>(gradient, first, dim, g);
      Elements{p.step, row, first}.step(numbers, g, row_second);
    }
  }
}

}  // namespace nce::cuda
