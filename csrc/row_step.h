// One step of an optimizer on one row of a table: the arithmetic that the CPU and CUDA share.
//
// A row's state moves only when the row is touched. Rules, with g the row's gradient plus weight_decay times the row:
//   SGD              b = momentum b + (1 - dampening) g, at the first touch g;  w -= rate (g + momentum b, or b)
//   Adagrad          s += g^2;                                                  w -= rate g / (sqrt(s) + eps)
//   row-wise Adagrad s += mean(g^2), one number a row;                          w -= rate g / (sqrt(s) + eps)
//   Adam             m += (1 - beta1) (g - m), v = beta2 v + (1 - beta2) g^2;
//                    w -= rate / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps), t the number of the row's touches,
//                    or that of all steps
// Decoupled decay comes before the rule: w *= product of the factors of all steps since the row's last touch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"
#include "sampled_loss.h"

namespace nce {

enum class StepRule : int32_t { kSgd = 0, kAdagrad = 1, kRowwiseAdagrad = 2, kAdam = 3 };

// What a step takes besides tensors, in the order of the operators' arguments. A rule reads those that it has.
struct Hyperparameters {
  StepRule rule;
  int64_t step;                // number of the step, from 1
  double rate;                 // learning rate
  double weight_decay;         // coupled: added to the gradient, times the weight
  double log_decay;            // decoupled: sum of log(factor of the weight) over all steps so far
  double momentum, dampening;  // SGD's, as nesterov is
  double beta1, beta2;         // Adam's
  double eps;
  bool nesterov, maximize;
};

// A step on rows of one table. "compute" is float, or double if the weight is stored as double. State rows lie `dim`
// apart.
struct RowStep : Hyperparameters {
  int64_t dim, n_rows;
  void* weight;
  int64_t weight_stride;
  void* first;         // compute [n_rows, dim]: SGD's b, Adam's m; or null
  void* second;        // compute [n_rows, dim]: Adagrad's s, Adam's v; of row-wise Adagrad [n_rows]; or null
  int32_t* row_steps;  // [n_rows]: how often each row was touched; null: rows do not count, and Adam corrects by `step`
  double* decayed;     // [n_rows]: log_decay at each row's last touch; null: no decoupled decay
  float* master;       // [n_rows, dim]: the weight in full, of which `weight` is a rounding; or null

  const void* gradient_scale;  // compute scalar, where the kernel runs, that multiplies all gradients; or null
  const int64_t* seed;  // [2], where the kernel runs: rounds 16-bit weights up or down at random; null: to nearest
  int64_t seed_stride;
};

// Numbers that all elements of a row share.
template <class Real>
struct RowNumbers {
  Real scale;         // of the gradient, its sign included
  Real decay;         // factor of the weight
  Real weight_decay;  // added to the gradient, times the weight
  Real rate, eps;
  Real keep1, take1, keep2, take2;  // the first and the second state become keep * state + take * (g, or g^2)
  Real root_correction;             // Adam: sqrt(1 - beta2^t)
  bool nesterov, has_first;
};

// base^n, n >= 0, by squaring, whose roundings are the same on the host and on a GPU; those of pow() are not.
NCE_HD double power(double base, int64_t n) {
  double result = 1;
  for (; n > 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

NCE_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}
NCE_HD double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

// The numbers of a row, from its counters as they were before this step.
template <class Real>
NCE_HD RowNumbers<Real> numbers_of(const RowStep& p, int64_t row) {
  RowNumbers<Real> n;
  const int64_t touches = p.row_steps ? int64_t{p.row_steps[row]} + 1 : p.step;
  n.scale = p.gradient_scale ? *static_cast<const Real*>(p.gradient_scale) : Real(1);
  if (p.maximize) n.scale = -n.scale;
  n.decay = p.decayed ? static_cast<Real>(::exp(p.log_decay - p.decayed[row])) : Real(1);
  n.weight_decay = static_cast<Real>(p.weight_decay);
  n.rate = static_cast<Real>(p.rate);
  n.eps = static_cast<Real>(p.eps);
  n.nesterov = p.nesterov;
  n.has_first = p.first != nullptr;
  if (p.rule == StepRule::kAdam) {
    n.keep1 = static_cast<Real>(p.beta1);
    n.take1 = static_cast<Real>(1 - p.beta1);
    n.keep2 = static_cast<Real>(p.beta2);
    n.take2 = static_cast<Real>(1 - p.beta2);
    n.rate = static_cast<Real>(p.rate / (1 - power(p.beta1, touches)));
    n.root_correction = static_cast<Real>(square_root(1 - power(p.beta2, touches)));
  } else {
    const bool first_touch = p.row_steps && p.row_steps[row] == 0;
    n.keep1 = static_cast<Real>(p.momentum);
    n.take1 = first_touch ? Real(1) : static_cast<Real>(1 - p.dampening);
    n.keep2 = n.take2 = n.root_correction = Real(1);
  }
  return n;
}

// Moves the row's counters on; called once, after numbers_of.
NCE_HD void count_touch(const RowStep& p, int64_t row) {
  if (p.row_steps) ++p.row_steps[row];
  if (p.decayed) p.decayed[row] = p.log_decay;
}

// The gradient g of the rules: scaled, with the coupled decay. `weight` is the element before decoupled decay; no step
// has both decays.
template <class Real>
NCE_HD Real step_gradient(const RowNumbers<Real>& n, Real gradient, Real weight) {
  const Real scaled = n.scale * gradient;
  return n.weight_decay != Real(0) ? scaled + n.weight_decay * weight : scaled;  // 0 times infinity is not 0
}

// Steps on one element: replaces `weight`, and `first` and `second` where the rule has them. Row-wise Adagrad's
// `second` is the row's new sum of squares, and stays.
template <StepRule kRule, class Real>
NCE_HD void step_element(const RowNumbers<Real>& n, Real gradient, Real& weight, Real& first, Real& second) {
  Real g = step_gradient(n, gradient, weight);
  weight *= n.decay;
  if constexpr (kRule == StepRule::kSgd) {
    if (n.has_first) {
      first = n.keep1 * first + n.take1 * g;
      g = n.nesterov ? g + n.keep1 * first : first;
    }
    weight -= n.rate * g;
  } else if constexpr (kRule == StepRule::kAdam) {
    first += n.take1 * (g - first);
    second = n.keep2 * second + n.take2 * (g * g);
    weight -= n.rate * (first / (square_root(second) / n.root_correction + n.eps));
  } else {
    if constexpr (kRule == StepRule::kAdagrad) second += g * g;
    weight -= n.rate * (g / (square_root(second) + n.eps));
  }
}

// 16 random bits of element d of a row; those of 8 elements share a Philox block.
NCE_HD uint32_t rounding_bits(const Words& words, int element_of_8) {
  const int w = element_of_8 / 2;
  const uint32_t word = w == 0 ? words.w[0] : w == 1 ? words.w[1] : w == 2 ? words.w[2] : words.w[3];
  return element_of_8 & 1 ? word >> 16 : word & 0xFFFFu;
}

NCE_HD Words rounding_words(Seed seed, int64_t row, int64_t d) {
  return random_words(seed, static_cast<uint32_t>(row), static_cast<uint32_t>(d / 8));
}

// Rounds up with the probability of the fraction that is cut off, so that the expected value is the number itself.
NCE_HD uint16_t round_to_bfloat16(float value, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | (magnitude > 0x7F800000u ? 0x0040u : 0u));
  return static_cast<uint16_t>((bits + random) >> 16);
}

NCE_HD uint16_t round_to_half(float value, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude < 0x38800000u) {  // below 2^-14 the numbers lie 2^-24 apart
    float units;
    std::memcpy(&units, &magnitude, 4);
    units *= 16777216.0f;
    const auto whole = static_cast<uint32_t>(units);
    const float cut = (units - static_cast<float>(whole)) * 65536.0f;
    return static_cast<uint16_t>(sign | (whole + (static_cast<float>(random) < cut ? 1u : 0u)));
  }
  const uint32_t rounded = (magnitude + (random >> 3) - (112u << 23)) >> 13;
  return static_cast<uint16_t>(sign | (magnitude >= 0x47800000u || rounded > 0x7C00u ? 0x7C00u : rounded));
}

}  // namespace nce
