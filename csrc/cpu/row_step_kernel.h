// Steps of an optimizer on rows of a table: see row_step.h for the rules.
#pragma once

#include "../row_step.h"
#include "row_grad_kernel.h"
#include "rows.h"
#include "simd.h"

namespace nce::NCE_SIMD_NAMESPACE {

// Where a row's weights are in compute precision: in the table, in its master copy, or, widened, in `scratch`, from
// which end_weights rounds them.
template <class Stored, class Real>
NCE_INLINE Real* begin_weights(const RowStep& p, int64_t row, Real* scratch) {
  Stored* stored = static_cast<Stored*>(p.weight) + row * p.weight_stride;
  if constexpr (sizeof(Stored) == sizeof(Real)) {
    return stored;
  } else {
    if (p.master) return p.master + row * p.dim;
    widen(stored, p.dim, scratch);
    return scratch;
  }
}

template <class Stored>
NCE_INLINE void round_elements(const float* weights, const Words& words, int64_t n, Stored* out) {
  for (int i = 0; i < n; ++i) {
    const uint32_t random = rounding_bits(words, i);
    if constexpr (std::is_same_v<Stored, BFloat16>) {
      out[i].bits = round_to_bfloat16(weights[i], random);
    } else {
      out[i].bits = round_to_half(weights[i], random);
    }
  }
}

template <class Stored, class Real>
NCE_INLINE void end_weights(const RowStep& p, int64_t row, const Real* weights) {
  if constexpr (sizeof(Stored) != sizeof(Real)) {
    Stored* stored = static_cast<Stored*>(p.weight) + row * p.weight_stride;
    int64_t d = 0;
    if (p.seed && !p.master) {
      const Seed seed = read_seed(p.seed, p.seed_stride);
      for (; d < p.dim; d += 8) {
        round_elements(weights + d, rounding_words(seed, row, d), p.dim - d < 8 ? p.dim - d : 8, stored + d);
      }
      return;
    }
    for (; d + kLanes <= p.dim; d += kLanes) store(stored + d, load(weights + d));
    if (d < p.dim) store_first(stored + d, load_first(weights + d, p.dim - d), p.dim - d);
  }
}

template <class Real>
NCE_INLINE Real mean_square(const RowNumbers<Real>& numbers, const Real* gradient, const Real* weights, int64_t dim) {
  const RowNumbers<Real> n = numbers;
  Real lanes[kLanes] = {};
  const auto add = [&](int64_t d, int lane) NCE_INLINE_LAMBDA {
    const Real g = step_gradient(n, gradient[d], weights[d]);
    lanes[lane] += g * g;
  };
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    for (int i = 0; i < kLanes; ++i) add(d + i, i);
  }
  for (int i = 0; d + i < dim; ++i) add(d + i, i);
  return sum(load(lanes)) / static_cast<Real>(dim);
}

// kFirst, kSecond: whether the rule has that state for every element.
template <StepRule kRule, bool kFirst, bool kSecond, class Real>
NCE_INLINE void step_elements(const RowNumbers<Real>& numbers, int64_t dim, const Real* __restrict gradient,
                              Real* __restrict weights, Real* __restrict first, Real* __restrict second,
                              Real row_second) {
  const RowNumbers<Real> n = numbers;
#pragma GCC ivdep
  for (int64_t d = 0; d < dim; ++d) {
    Real w = weights[d], a = Real(0), b = row_second;
    if constexpr (kFirst) a = first[d];
    if constexpr (kSecond) b = second[d];
    step_element<kRule>(n, gradient[d], w, a, b);
    weights[d] = w;
    if constexpr (kFirst) first[d] = a;
    if constexpr (kSecond) second[d] = b;
  }
}

// Not inline: its code would be there once more for every type of hidden, to save one call a row.
template <class Stored, class Real>
static __attribute__((noinline)) void step_row(const RowStep& p, int64_t row, const Real* gradient, Real* scratch) {
  const RowNumbers<Real> n = numbers_of<Real>(p, row);
  Real* weights = begin_weights<Stored, Real>(p, row, scratch);
  Real* first = p.first ? static_cast<Real*>(p.first) + row * p.dim : nullptr;
  Real* second = static_cast<Real*>(p.second);
  const Real none = Real(0);
  switch (p.rule) {
    case StepRule::kSgd:
      if (first) {
        step_elements<StepRule::kSgd, true, false>(n, p.dim, gradient, weights, first, second, none);
      } else {
        step_elements<StepRule::kSgd, false, false>(n, p.dim, gradient, weights, first, second, none);
      }
      break;
    case StepRule::kAdagrad:
      step_elements<StepRule::kAdagrad, false, true>(n, p.dim, gradient, weights, first, second + row * p.dim, none);
      break;
    case StepRule::kRowwiseAdagrad:
      second[row] += mean_square(n, gradient, weights, p.dim);
      step_elements<StepRule::kRowwiseAdagrad, false, false>(n, p.dim, gradient, weights, first, second, second[row]);
      break;
    case StepRule::kAdam:
      step_elements<StepRule::kAdam, true, true>(n, p.dim, gradient, weights, first, second + row * p.dim, none);
      break;
  }
  end_weights<Stored>(p, row, weights);
  count_touch(p, row);
}

// Prefetches what a step on `row` will read.
template <class Stored, class Real>
NCE_INLINE void prefetch_step(const RowStep& p, int64_t row) {
  constexpr int kLine = 64;
  const auto fetch = [](const void* memory, int64_t bytes) NCE_INLINE_LAMBDA {
    for (int64_t byte = 0; byte < bytes; byte += kLine) {
      __builtin_prefetch(static_cast<const char*>(memory) + byte, 1);
    }
  };
  const int64_t bytes = p.dim * static_cast<int64_t>(sizeof(Real));
  fetch(static_cast<const Stored*>(p.weight) + row * p.weight_stride, p.dim * static_cast<int64_t>(sizeof(Stored)));
  if (p.first) fetch(static_cast<const Real*>(p.first) + row * p.dim, bytes);
  if (p.rule == StepRule::kRowwiseAdagrad) {
    fetch(static_cast<const Real*>(p.second) + row, 1);
  } else if (p.second) {
    fetch(static_cast<const Real*>(p.second) + row * p.dim, bytes);
  }
  if (p.master) fetch(p.master + row * p.dim, bytes);
  if (p.row_steps) fetch(p.row_steps + row, 1);
  if (p.decayed) fetch(p.decayed + row, 1);
}

constexpr int64_t kRowsAhead = 4;

// Steps on rows classes[begin] .. classes[end - 1], or begin .. end - 1 if classes is null, by gradient rows of the
// weight's storage.
template <class Stored, class Real>
static void row_step(const RowStep& p, const int64_t* classes, const void* gradient, int64_t gradient_stride,
                     int64_t begin, int64_t end, void* scratch) {
  Real* weights = static_cast<Real*>(scratch);
  Real* widened = weights + (p.dim + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kRowsAhead < end) prefetch_step<Stored, Real>(p, classes ? classes[i + kRowsAhead] : i + kRowsAhead);
    const Stored* own = static_cast<const Stored*>(gradient) + i * gradient_stride;
    const Real* wide = widened;
    if constexpr (sizeof(Stored) == sizeof(Real)) {
      wide = own;
    } else {
      widen(own, p.dim, widened);
    }
    step_row<Stored, Real>(p, classes ? classes[i] : i, wide, weights);
  }
}

// A sink that has each segment summed into `gradient`, unless that is null, and calls a function then. By pointer, so
// that the code of the sums is compiled once for all that is done with them.
template <class Real>
struct CalledSink {
  Real* gradient;
  const void* user;
  void (*ahead_of)(const void* user, int64_t s);
  void (*finish_of)(const void* user, int64_t s, int64_t row, Real bias);

  NCE_INLINE_LAMBDA inline void ahead(int64_t s) const { ahead_of(user, s); }
  NCE_INLINE_LAMBDA inline Real* row(int64_t, int64_t) const { return gradient; }
  NCE_INLINE_LAMBDA inline bool streamed() const { return false; }
  NCE_INLINE_LAMBDA inline void finish(int64_t s, int64_t row, Real bias) const { finish_of(user, s, row, bias); }
};

template <class Real>
static __attribute__((noinline)) void call_for_segments(const RowGrad& p, int64_t begin, int64_t end, Real* partial,
                                                        const CalledSink<Real>& sink) {
  with_hidden_type<Real>(p.hidden_storage, [&]<class Hidden>(const Hidden*) NCE_INLINE_LAMBDA {
    for_each_segment<Real, Hidden>(p, begin, end, partial, sink);
  });
}

// Arguments of the functions that turn segments into steps on their rows; only the bias's gradient is written.
template <class Real>
struct SegmentSteps {
  const RowGrad& p;
  const RowStep& step;
  int64_t end;
  Real *gradient, *weights;
};

template <class Stored, class Real>
static void prefetch_segment(const void* user, int64_t s) {
  const auto& of = *static_cast<const SegmentSteps<Real>*>(user);
  if (s + kRowsAhead >= of.end) return;
  prefetch_step<Stored, Real>(of.step, static_cast<int64_t>(of.p.pairs[of.p.segment_start[s + kRowsAhead]] >> 32));
}

template <class Stored, class Real>
static void step_segment(const void* user, int64_t s, int64_t row, Real bias) {
  const auto& of = *static_cast<const SegmentSteps<Real>*>(user);
  step_row<Stored, Real>(of.step, row, of.gradient, of.weights);
  if (of.p.bias) store_first(static_cast<Stored*>(of.p.bias) + s, Vec<Real>(bias), 1);
}

template <class Stored, class Real>
static void row_grad_step(const RowGrad& p, const RowStep& step, int64_t begin, int64_t end, void* scratch) {
  if (begin == end) return;
  const int64_t padded = (p.dim + kLanes - 1) / kLanes * kLanes;
  Real *partial = static_cast<Real*>(scratch), *gradient = partial + padded;
  const SegmentSteps<Real> steps{p, step, end, gradient, gradient + padded};
  call_for_segments(p, begin, end, partial,
                    CalledSink<Real>{gradient, &steps, prefetch_segment<Stored, Real>, step_segment<Stored, Real>});
}

// Arguments of the function that writes squares[s], the squared norm of segment s's gradient row and bias element.
template <class Real>
struct SegmentNorms {
  int64_t dim;
  const Real* gradient;  // null: without rows
  bool with_bias;
  double* squares;
};

template <class Real>
static void square_segment(const void* user, int64_t s, int64_t, Real bias) {
  const auto& of = *static_cast<const SegmentNorms<Real>*>(user);
  const int64_t dim = of.gradient ? of.dim : 0;
  double lanes[kLanes] = {};
  const auto add = [&](int64_t d, int lane) NCE_INLINE_LAMBDA {
    const auto g = static_cast<double>(of.gradient[d]);
    lanes[lane] += g * g;
  };
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    for (int i = 0; i < kLanes; ++i) add(d + i, i);
  }
  for (int i = 0; d + i < dim; ++i) add(d + i, i);
  of.squares[s] = sum(load(lanes)) + (of.with_bias ? static_cast<double>(bias) * static_cast<double>(bias) : 0);
}

static void nothing_ahead(const void*, int64_t) {}

template <class Real>
static void row_grad_norm(const RowGrad& p, bool with_rows, bool with_bias, int64_t begin, int64_t end, void* scratch,
                          double* squares) {
  if (begin == end) return;
  Real* partial = static_cast<Real*>(scratch);
  Real* gradient = with_rows ? partial + (p.dim + kLanes - 1) / kLanes * kLanes : nullptr;
  const SegmentNorms<Real> norms{p.dim, gradient, with_bias, squares};
  call_for_segments(p, begin, end, partial, CalledSink<Real>{gradient, &norms, nothing_ahead, square_segment<Real>});
}

}  // namespace nce::NCE_SIMD_NAMESPACE
