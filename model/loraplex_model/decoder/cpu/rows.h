// Operations on single rows between the matrix products.
#pragma once

#include <cmath>

#include "simd.h"

namespace loraplex {

// 1 / sqrt(mean(x^2) + eps)
inline float inverse_rms(const float* x, int width, float eps) {
  vf squares = {};
  int i = 0;
  for (; i + LANES <= width; i += LANES) squares = load(x + i) * load(x + i) + squares;
  float total = sum(squares);
  for (; i < width; i++) total = multiply_add(x[i], x[i], total);
  return 1.0f / std::sqrt(total / width + eps);
}

// out = x / rms(x) * weight. `out` may be `x`.
template <class T>
inline void rms_norm(const float* x, const T* weight, float eps, int width, float* out) {
  float inverse = inverse_rms(x, width, eps);
  int i = 0;
  for (; i + LANES <= width; i += LANES) store(out + i, load(x + i) * inverse * load(weight + i));
  for (; i < width; i++) out[i] = x[i] * inverse * load1(weight + i);
}

// x += y
inline void add(float* x, const float* y, int width) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) store(x + i, load(x + i) + load(y + i));
  for (; i < width; i++) x[i] += y[i];
}

// out = silu(gate) * up, silu(g) = g / (1 + e^-g)
inline void silu_mul(const float* gate, const float* up, int width, float* out) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) {
    vf g = load(gate + i);
    store(out + i, g / (exp(-g) + 1.0f) * load(up + i));
  }
  for (; i < width; i++) {
    vf g = set1(gate[i]);
    out[i] = (g / (exp(-g) + 1.0f))[0] * up[i];
  }
}

// Rotates pairs (x[i], x[i + half]) by the position's angles, in place; cos and sin are [half].
inline void rotate(float* x, const float* cos, const float* sin, int half) {
  int i = 0;
  for (; i + LANES <= half; i += LANES) {
    vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

// Copies floats into storage of type T.
template <class T>
inline void put(const float* x, int width, T* out) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) store(out + i, load(x + i));
  for (; i < width; i++) store1(out + i, x[i]);
}

}  // namespace loraplex
