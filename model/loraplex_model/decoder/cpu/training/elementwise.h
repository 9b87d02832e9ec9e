// Elementwise steps of training and their derivatives, each one pass over memory, as `ops/autograd.py`
// calls them: inputs are [rows][width], and a norm keeps one number per row. T is the type of what products
// read and give, float or bf16; the residual stream and the arithmetic are float.
#pragma once

#include <algorithm>
#include <vector>

#include "../activations.h"
#include "../rows.h"

namespace loraplex {

// out = x * scale * weight
template <class T>
inline void scaled(const float* x, float scale, const float* weight, int width, T* out) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < width; i++) store1(out + i, x[i] * scale * weight[i]);
}

// With n = x * scale and h = g * weight: out = scale * (h - n * mean(h * n)).
template <class T>
inline void rms_norm_backward(const float* x, float scale, const float* weight, const T* g, int width, float* out) {
  vf products = {};
  int i = 0;
  for (; i + LANES <= width; i += LANES) products = load(g + i) * load(weight + i) * load(x + i) + products;
  float total = sum(products);
  for (; i < width; i++) total = multiply_add(load1(g + i) * weight[i], x[i], total);
  float along = total * scale * scale / width;  // mean(h * n) * scale: the factor of x
  for (i = 0; i + LANES <= width; i += LANES)
    store(out + i, (load(g + i) * load(weight + i) - load(x + i) * along) * scale);
  for (; i < width; i++) out[i] = (load1(g + i) * weight[i] - x[i] * along) * scale;
}

// out = silu(gate) * up; floats have it in activations.h.
inline void silu_mul(const bf16* gate, const bf16* up, int width, bf16* out) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) {
    vf a = load(gate + i);
    store(out + i, a / (exp(-a) + 1.0f) * load(up + i));
  }
  for (; i < width; i++) {
    float a = load1(gate + i);
    store1(out + i, a / (exp(set1(-a)) + 1.0f)[0] * load1(up + i));
  }
}

// With s = sigmoid(gate): d_up = g * gate * s, d_gate = g * up * (s + gate * s * (1 - s)).
template <class T>
inline void silu_mul_backward(const T* gate, const T* up, const T* g, int width, T* d_gate, T* d_up) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) {
    vf a = load(gate + i), from = load(g + i), s = 1.0f / (exp(-a) + 1.0f), silu = a * s;
    store(d_up + i, from * silu);
    store(d_gate + i, from * load(up + i) * (s + silu * (1.0f - s)));
  }
  for (; i < width; i++) {
    float a = load1(gate + i), from = load1(g + i);
    float s = (1.0f / (exp(set1(-a)) + 1.0f))[0], silu = a * s;
    store1(d_up + i, from * silu);
    store1(d_gate + i, from * load1(up + i) * (s + silu * (1.0f - s)));
  }
}

// Rotates pairs (x[i], x[i + half]) by the position's angles, in place, as `rotate` in rows.h; `sign` -1 rotates back.
inline void rotate(bf16* x, const float* cos, const float* sin, float sign, int half) {
  int i = 0;
  for (; i + LANES <= half; i += LANES) {
    vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i) * sign;
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    float a = load1(x + i), b = load1(x + half + i), s = sin[i] * sign;
    store1(x + i, a * cos[i] - b * s);
    store1(x + half + i, b * cos[i] + a * s);
  }
}

// Cross-entropy of one row of scores. With `slope` the scores become its derivative: the softmax minus one at
// the target. `buffer` has `width` floats.
template <class T>
inline float cross_entropy(T* scores, int64_t target, int width, bool slope, float* buffer) {
  vf highest = set1(-INFINITY), total = {};
  int i = 0;
  for (; i + LANES <= width; i += LANES) highest = max(highest, load(scores + i));
  float most = max_lane(highest), rest = 0, right = load1(scores + target);
  for (; i < width; i++) most = std::max(most, load1(scores + i));
  for (i = 0; i + LANES <= width; i += LANES) {
    vf e = exp(load(scores + i) - most);
    store(buffer + i, e);
    total += e;
  }
  for (; i < width; i++) rest += buffer[i] = exp(set1(load1(scores + i) - most))[0];
  float all = sum(total) + rest;
  if (slope) {
    float share = 1.0f / all, own = buffer[target];
    for (i = 0; i + LANES <= width; i += LANES) store(scores + i, load(buffer + i) * share);
    for (; i < width; i++) store1(scores + i, buffer[i] * share);
    store1(scores + target, own * share - 1.0f);
  }
  return most + std::log(all) - right;
}

// Calls f(row) for all rows, on all threads.
template <class F>
inline void each_row(int rows, int threads, F f) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int m = 0; m < rows; m++) f(size_t(m));
}

}  // namespace loraplex
