// The binary objective of one candidate column and its derivative.
#pragma once

#include <cfloat>
#include <cmath>

#include "host_device.h"

namespace nce {

template <class Real>
struct Column {
  Real loss;    // label * softplus(-z) + (1 - label) * softplus(z)
  Real dlogit;  // its derivative sigmoid(z) - label
};

// What binary_column needs of a number. cpu/simd.h has the same for vectors of 16.
NCE_HD float magnitude(float z) { return fabsf(z); }
NCE_HD double magnitude(double z) { return fabs(z); }
NCE_HD float max_zero(float z) { return z > 0 ? z : 0; }
NCE_HD double max_zero(double z) { return z > 0 ? z : 0; }
NCE_HD float clamp_finite(float z) { return z > FLT_MAX ? FLT_MAX : z < -FLT_MAX ? -FLT_MAX : z; }
NCE_HD double clamp_finite(double z) { return z > DBL_MAX ? DBL_MAX : z < -DBL_MAX ? -DBL_MAX : z; }
NCE_HD float exp_negative(float a) { return expf(-a); }
NCE_HD double exp_negative(double a) { return exp(-a); }
NCE_HD float reciprocal(float x) {  // of 1 .. 3
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}
NCE_HD double reciprocal(double x) { return 1.0 / x; }
// log1p(e) = 2 atanh(e / (2 + e)) for 0 <= e <= 1: a series in the square of at most 1/3, and no branch.
NCE_HD float log1p_unit(float e) {
  const float s = e * reciprocal(2.0f + e), square = s * s;
  float p = 2.0f / 13;
  p = fmaf(p, square, 2.0f / 11);
  p = fmaf(p, square, 2.0f / 9);
  p = fmaf(p, square, 2.0f / 7);
  p = fmaf(p, square, 2.0f / 5);
  p = fmaf(p, square, 2.0f / 3);
  p = fmaf(p, square, 2.0f);
  return p * s;
}
NCE_HD double log1p_unit(double e) { return log1p(e); }
NCE_HD float select_nonnegative(float z, float yes, float no) { return z >= 0 ? yes : no; }
NCE_HD double select_nonnegative(double z, double yes, double no) { return z >= 0 ? yes : no; }

// e = exp(-|z|) never overflows, and serves softplus and sigmoid alike. dlogit is formed from sigmoid(-z), not from
// sigmoid(z) - 1, which would lose the digits of a well-classified target. A score that overflowed is brought back
// to the largest finite number, so that 0 * infinity cannot turn a zero contribution into NaN.
template <class Real>
NCE_HD Column<Real> binary_column(Real z, Real label) {
  z = clamp_finite(z);
  const Real one(1), zero(0);
  const Real e = exp_negative(magnitude(z));
  const Real larger = reciprocal(one + e);  // sigmoid(|z|)
  const Real smaller = e * larger;
  const Real positive = select_nonnegative(z, larger, smaller);  // sigmoid(z)
  const Real negative = select_nonnegative(z, smaller, larger);  // sigmoid(-z)
  const Real unlabelled = one - label;
  const Real loss = unlabelled * max_zero(z) + label * max_zero(zero - z) + log1p_unit(e);
  return Column<Real>{loss, unlabelled * positive - label * negative};
}

// binary_column of label 0, for a finite z.
template <class Real>
NCE_HD Column<Real> negative_column(Real z) {
  const Real e = exp_negative(magnitude(z)), larger = reciprocal(Real(1) + e);
  return Column<Real>{max_zero(z) + log1p_unit(e), select_nonnegative(z, larger, e * larger)};
}

}  // namespace nce
