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

// out = x / rms(x) * (weight + offset). `out` may be `x`.
template <class T>
inline void rms_norm(const float* x, const T* weight, float offset, float eps, int width, float* out) {
  float inverse = inverse_rms(x, width, eps);
  int i = 0;
  for (; i + LANES <= width; i += LANES) store(out + i, load(x + i) * inverse * (load(weight + i) + offset));
  for (; i < width; i++) out[i] = x[i] * inverse * (load1(weight + i) + offset);
}

// out = (x - mean) / deviation * (weight + offset) + bias, bias or null. `out` may be `x`.
template <class T, class B>
inline void layer_norm(const float* x, const T* weight, const B* bias, float offset, float eps, int width,
                       float* out) {
  vf totals = {}, squares = {};
  int i = 0;
  for (; i + LANES <= width; i += LANES) totals += load(x + i);
  float total = sum(totals);
  for (; i < width; i++) total += x[i];
  float mean = total / width;
  for (i = 0; i + LANES <= width; i += LANES) squares = (load(x + i) - mean) * (load(x + i) - mean) + squares;
  float square = sum(squares);
  for (; i < width; i++) square = multiply_add(x[i] - mean, x[i] - mean, square);
  float inverse = 1.0f / std::sqrt(square / width + eps);
  for (i = 0; i + LANES <= width; i += LANES) {
    vf normed = (load(x + i) - mean) * inverse, factor = load(weight + i) + offset;
    store(out + i, bias ? normed * factor + load(bias + i) : normed * factor);
  }
  for (; i < width; i++) {
    float normed = (x[i] - mean) * inverse, factor = load1(weight + i) + offset;
    out[i] = bias ? multiply_add(normed, factor, load1(bias + i)) : normed * factor;
  }
}

// x *= factor
inline void scale_row(float* x, float factor, int width) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) store(x + i, load(x + i) * factor);
  for (; i < width; i++) x[i] *= factor;
}

// x += y
inline void add(float* x, const float* y, int width) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) store(x + i, load(x + i) + load(y + i));
  for (; i < width; i++) x[i] += y[i];
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

// The same for pairs (x[2 i], x[2 i + 1]).
inline void rotate_interleaved(float* x, const float* cos, const float* sin, int half) {
  int i = 0;
  for (; i + LANES <= half; i += LANES) {
    vf low = load(x + 2 * i), high = load(x + 2 * i + LANES), c = load(cos + i), s = load(sin + i);
    vf a = even_lanes(low, high), b = odd_lanes(low, high);
    vf first = a * c - b * s, second = b * c + a * s;
    store(x + 2 * i, interleave_low(first, second));
    store(x + 2 * i + LANES, interleave_high(first, second));
  }
  for (; i < half; i++) {
    float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = multiply_add(a, cos[i], -(b * sin[i]));
    x[2 * i + 1] = multiply_add(b, cos[i], a * sin[i]);
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
