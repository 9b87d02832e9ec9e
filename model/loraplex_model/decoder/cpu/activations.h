// Activations of the MLP and caps of scores, vectors at a time. Errors are measured against float64 by
// tests/kernels/test_rows.py; NaN stays NaN in all of them.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace loraplex {

constexpr int GATED_COLUMNS = 512;  // of a group of rows, in a unit of work that applies an activation

// The numbers of `Activation` in adapters/delta.py.
enum Activation { NONE, RELU, SILU, GELU, GELU_TANH, TANH, SIGMOID, LEAKY_RELU };

// A number between the two matrices of an adapter's bottleneck.
inline float activate(float x, int activation) {
  switch (activation) {
    case RELU: return std::max(x, 0.0f);
    case SILU: return x / (1.0f + std::exp(-x));
    case GELU: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case TANH: return std::tanh(x);
    case SIGMOID: return 1.0f / (1.0f + std::exp(-x));
    case LEAKY_RELU: return x > 0 ? x : 0.01f * x;
    default: return x;
  }
}

inline vf magnitude(vf x) { return bit_cast<vf>(bit_cast<vu>(x) & 0x7fffffffu); }

// The magnitude of x with the sign of `sign`.
inline vf with_sign(vf x, vf sign) {
  return bit_cast<vf>((bit_cast<vu>(x) & 0x7fffffffu) | (bit_cast<vu>(sign) & 0x80000000u));
}

// 2^(scale d) for d <= 0, within 3e-6 of itself, and 1 for 0; below `lowest`, what it is there. The result at
// `lowest` must be a normal number. NaN stays NaN.
inline vf power2(vf d, float scale, float lowest) {
  d = lowest > d ? set1(lowest) : d;
  vf rounded = d * scale + 12582912.0f, r = d * scale - (rounded - 12582912.0f);
  vf p = r * 9.582853095e-03f + 5.590642460e-02f;
  p = p * r + 2.402409861e-01f;
  p = p * r + 6.931241934e-01f;
  p = p * r + 1.0f;
  return bit_cast<vf>(bit_cast<vu>(p) + (bit_cast<vu>(rounded) << 23));
}

// Within 2 ulp. Below 0.625 a polynomial, fitted to tanh(x) / x; elsewhere by the exponential.
inline vf tanh(vf x) {
  vf u = x * x, a = magnitude(x);
  vf p = u * -5.704982206e-03f + 2.063908242e-02f;
  p = p * u - 5.373971537e-02f;
  p = p * u + 1.333144158e-01f;
  p = p * u - 3.333328068e-01f;
  vf small = p * u * x + x;
  vf large = with_sign(1.0f - 2.0f / (exp(a + a) + 1.0f), x);
  return a < 0.625f ? small : large;
}

// The part of a standard normal distribution that lies below x: (1 + erf(x / sqrt(2))) / 2, within 8 ulp
// from -3 on; further out the exponential multiplies the rounding error of its argument. Polynomials are
// fitted to erf(z) / z for z < 0.6, and to erfc(z) e^(z^2) in 1 / (z + 1.5) beyond.
inline vf normal_below(vf x) {
  vf z = x * 0.70710678f, u = z * z, a = magnitude(z);
  vf p = u * 4.512357991e-03f - 2.664698660e-02f;
  p = p * u + 1.128099188e-01f;
  p = p * u - 3.761251271e-01f;
  p = p * u + 1.128379107e+00f;
  vf near = p * (z * 0.5f) + 0.5f;
  vf t = 1.0f / (a + 1.5f);
  vf q = t * -4.799979687e+00f + 1.078931999e+01f;
  q = q * t - 8.041742325e+00f;
  q = q * t + 9.831653237e-01f;
  q = q * t + 4.162989855e-01f;
  q = q * t + 1.004039407e+00f;
  q = q * t + 8.458734155e-01f;
  q = q * t + 5.641667247e-01f;
  q = q * t + 1.224847665e-06f;
  vf beyond = exp(x * x * -0.5f) * q * 0.5f;
  return a < 0.6f ? near : (x > 0.0f ? 1.0f - beyond : beyond);
}

inline vf silu(vf x) { return x / (exp(-x) + 1.0f); }

// The exact GELU, within 8 ulp from -3 on.
inline vf gelu(vf x) { return x * normal_below(x); }

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2 u)); within 16 ulp
// from -3 on.
inline vf gelu_tanh(vf x) {
  vf u = x * (x * x * -0.0713548163f - 1.59576912f);
  return x / (exp(u) + 1.0f);
}

// out = f(gate) * up; without gates (`up` is null) f(gate). `out` may be `gate`.
template <class F>
inline void activate_each(const float* gate, const float* up, int width, F f, float* out) {
  int i = 0;
  if (!up) {
    for (; i + LANES <= width; i += LANES) store(out + i, f(load(gate + i)));
    for (; i < width; i++) out[i] = f(set1(gate[i]))[0];
    return;
  }
  for (; i + LANES <= width; i += LANES) store(out + i, f(load(gate + i)) * load(up + i));
  for (; i < width; i++) out[i] = f(set1(gate[i]))[0] * up[i];
}

// One of the activations of an MLP.
inline void activate_row(const float* gate, const float* up, int activation, int width, float* out) {
  switch (activation) {
    case GELU: return activate_each(gate, up, width, [](vf x) { return gelu(x); }, out);
    case GELU_TANH: return activate_each(gate, up, width, [](vf x) { return gelu_tanh(x); }, out);
    default: return activate_each(gate, up, width, [](vf x) { return silu(x); }, out);
  }
}

inline void silu_mul(const float* gate, const float* up, int width, float* out) {
  activate_row(gate, up, SILU, width, out);
}

// x = cap tanh(scale x / cap)
inline void cap_row(float* x, int width, float scale, float cap) {
  auto capped = [&](vf v) { return tanh(v * scale / cap) * cap; };
  activate_each(x, nullptr, width, capped, x);
}

}  // namespace loraplex
