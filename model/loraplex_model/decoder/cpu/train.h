// Elementwise steps of training and their derivatives, each one pass over memory, as `ops/autograd.py`
// calls them: inputs are [rows][width], and a norm keeps one number per row.
#pragma once

#include "rows.h"

namespace loraplex {

// out = x * scale * weight
inline void scaled(const float* x, float scale, const float* weight, int width, float* out) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < width; i++) out[i] = x[i] * scale * weight[i];
}

// With n = x * scale and h = g * weight: out = scale * (h - n * mean(h * n)).
inline void rms_norm_backward(const float* x, float scale, const float* weight, const float* g, int width,
                              float* out) {
  vf products = {};
  int i = 0;
  for (; i + LANES <= width; i += LANES) products = load(g + i) * load(weight + i) * load(x + i) + products;
  float total = sum(products);
  for (; i < width; i++) total = multiply_add(g[i] * weight[i], x[i], total);
  float along = total * scale * scale / width;  // mean(h * n) * scale: the factor of x
  for (i = 0; i + LANES <= width; i += LANES)
    store(out + i, (load(g + i) * load(weight + i) - load(x + i) * along) * scale);
  for (; i < width; i++) out[i] = (g[i] * weight[i] - x[i] * along) * scale;
}

// With s = sigmoid(gate): d_up = g * gate * s, d_gate = g * up * (s + gate * s * (1 - s)).
inline void silu_mul_backward(const float* gate, const float* up, const float* g, int width, float* d_gate,
                              float* d_up) {
  int i = 0;
  for (; i + LANES <= width; i += LANES) {
    vf a = load(gate + i), from = load(g + i), s = 1.0f / (exp(-a) + 1.0f), silu = a * s;
    store(d_up + i, from * silu);
    store(d_gate + i, from * load(up + i) * (s + silu * (1.0f - s)));
  }
  for (; i < width; i++) {
    float s = (1.0f / (exp(set1(-gate[i])) + 1.0f))[0], silu = gate[i] * s;
    d_up[i] = g[i] * silu;
    d_gate[i] = g[i] * up[i] * (s + silu * (1.0f - s));
  }
}

}  // namespace loraplex
