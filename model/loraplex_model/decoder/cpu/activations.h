// Activations of the MLP and caps of scores, vectors at a time. Errors are measured against float64 by
// tests/kernels/test_activations.py; NaN stays NaN in all of them.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace loraplex {

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

// x to `magnitude` and the sign of `sign`.
inline vf with_sign(vf x, vf sign) {
  return bit_cast<vf>((bit_cast<vu>(x) & 0x7fffffffu) | (bit_cast<vu>(sign) & 0x80000000u));
}

// Within 4 ulp. Below 0.625 a polynomial, fitted to tanh(x) / x; elsewhere by the exponential.
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

// The part of a standard normal distribution that lies below x: (1 + erf(x / sqrt(2))) / 2, with its
// relative error within 1e-6 from -4 on; beyond, the exponential multiplies the rounding error of its
// argument. Polynomials are fitted to erf(z) / z for z < 1, and to erfc(z) e^(z^2) in 1 / (z + 2).
inline vf normal_below(vf x) {
  vf z = x * 0.70710678f, u = z * z, a = magnitude(z);
  vf p = u * 7.853860734e-05f - 8.010193706e-04f;
  p = p * u + 5.188327748e-03f;
  p = p * u - 2.685381286e-02f;
  p = p * u + 1.128358543e-01f;
  p = p * u - 3.761262596e-01f;
  p = p * u + 1.128379107e+00f;
  vf near = p * (z * 0.5f) + 0.5f;
  vf t = 1.0f / (a + 2.0f);
  vf q = t * 2.320838356e+01f - 2.777373123e+01f;
  q = q * t + 4.449532032e+00f;
  q = q * t + 2.272291183e+00f;
  q = q * t + 2.785458565e+00f;
  q = q * t + 1.986606121e+00f;
  q = q * t + 1.127201319e+00f;
  q = q * t + 5.642433167e-01f;
  q = q * t - 9.559071259e-07f;
  vf beyond = exp(-u) * q * 0.5f;
  return a < 1.0f ? near : (x > 0.0f ? 1.0f - beyond : beyond);
}

inline vf silu(vf x) { return x / (exp(-x) + 1.0f); }

// The exact GELU: x times the normal distribution below x.
inline vf gelu(vf x) { return x * normal_below(x); }

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2 u)).
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
