// Causal attention of single queries over a paged cache; query heads that share a key/value head together.
//
// The softmax is the plain one (maximum, exponentials, sum) over the positions in order. So a query's
// bits depend on its own context alone, not on its chunk and not on the batch.
#pragma once

#include <algorithm>
#include <cmath>

#include "activations.h"

namespace loraplex {

constexpr int HEADS_AT_ONCE = 3;  // query heads that read the keys and values in one walk

// How scores are made: softcap * tanh(scale * q . k / softcap), or scale * q . k if softcap is 0.
struct Scoring {
  float scale, softcap;
};

// The keys (or values) of one layer: [blocks][kv_heads][block_size][head_dim], so that the part of a block
// that one head reads is contiguous.
template <class T>
struct Pages {
  T* data;
  const int32_t* blocks;  // the sequence's block table
  int block_size, kv_heads, head_dim;

  T* at(int position, int head) const {
    size_t place = size_t(blocks[position / block_size]) * kv_heads + head;
    return data + (place * block_size + position % block_size) * head_dim;
  }

  // Calls use(j, pointer) for the positions j in [first, end), in order. Prefetches the next block, since
  // blocks are scattered and too short for the hardware prefetcher to detect.
  template <class Use>
  void each(int first, int end, int head, Use use) const {
    for (int j = first; j < end;) {
      int stop = std::min(end, (j / block_size + 1) * block_size);
      const T* next = stop < end ? at(stop, head) : at(first, head);
      for (T* p = at(j, head); j < stop; j++, p += head_dim, next += head_dim) {
        for (int i = 0; i < head_dim; i += 64 / int(sizeof(T))) __builtin_prefetch(next + i);
        use(j, p);
      }
    }
  }
};

// out[g][j] = scale * q[g] . k[j], for G heads.
template <int G, class T>
inline void scores(const float* q, const Pages<T>& keys, int head, int first, int end, float scale, float* out) {
  int d = keys.head_dim, n = end - first;
  keys.each(first, end, head, [&](int j, const T* k) {
    vf sums[G] = {};
    int i = 0;
    for (; i + LANES <= d; i += LANES) {
      vf ks = load(k + i);
      for (int g = 0; g < G; g++) sums[g] = load(q + g * d + i) * ks + sums[g];
    }
    for (int g = 0; g < G; g++) {
      float total = sum(sums[g]);
      for (int t = i; t < d; t++) total = multiply_add(q[g * d + t], load1(k + t), total);
      out[g * n + j - first] = total * scale;
    }
  });
}

// Replaces scores by their exponentials; returns 1 / their sum, a factor for the output.
inline float softmax(float* s, int n) {
  float top = s[0];
  for (int j = 1; j < n; j++) top = s[j] > top ? s[j] : top;
  vf totals = {};
  int j = 0;
  for (; j + LANES <= n; j += LANES) {
    vf e = exp(load(s + j) - top);
    store(s + j, e);
    totals += e;
  }
  float total = sum(totals);
  for (; j < n; j++) {
    s[j] = exp(set1(s[j] - top))[0];
    total += s[j];
  }
  return 1.0f / total;
}

// out[g][column:] = inverse[g] * sum over j of weights[g][j] * v[j][column:], for G heads and C vectors.
template <int G, int C, class T>
inline void weigh(const float* weights, const float* inverse, const Pages<T>& values, int head, int first,
                  int end, int column, float* out) {
  int d = values.head_dim, n = end - first;
  vf sums[G][C] = {};
  values.each(first, end, head, [&](int j, const T* v) {
    vf vs[C];
    for (int c = 0; c < C; c++) vs[c] = load(v + column + c * LANES);
    for (int g = 0; g < G; g++)
      for (int c = 0; c < C; c++) sums[g][c] = weights[g * n + j - first] * vs[c] + sums[g][c];
  });
  for (int g = 0; g < G; g++)
    for (int c = 0; c < C; c++) store(out + g * d + column + c * LANES, sums[g][c] * inverse[g]);
}

template <int G, class T>
inline void attend_heads(const float* q, const Pages<T>& keys, const Pages<T>& values, int head, int first,
                         int end, Scoring scoring, float* scratch, float* out) {
  int d = keys.head_dim, n = end - first;
  scores<G>(q, keys, head, first, end, scoring.scale, scratch);
  if (scoring.softcap)
    for (int g = 0; g < G; g++) cap_row(scratch + size_t(g) * n, n, 1.0f, scoring.softcap);
  float inverse[G];
  for (int g = 0; g < G; g++) inverse[g] = softmax(scratch + size_t(g) * n, n);
  int c = 0;
  for (; c + 4 * LANES <= d; c += 4 * LANES) weigh<G, 4>(scratch, inverse, values, head, first, end, c, out);
  for (; c + LANES <= d; c += LANES) weigh<G, 1>(scratch, inverse, values, head, first, end, c, out);
  for (; c < d; c++)
    for (int g = 0; g < G; g++) {
      float total = 0;
      for (int j = first; j < end; j++)
        total = multiply_add(scratch[size_t(g) * n + j - first], load1(values.at(j, head) + c), total);
      out[g * d + c] = total * inverse[g];
    }
}

// Output [group][head_dim] of the `group` query heads that share key/value head `head`, for the query at
// `position`. It sees positions (position - window, position], or all up to its own if window is 0.
// `scratch` holds HEADS_AT_ONCE floats for each of these positions.
template <class T>
inline void attend(const float* q, const Pages<T>& keys, const Pages<T>& values, int head, int group,
                   int position, int window, Scoring scoring, float* scratch, float* out) {
  int first = window ? std::max(0, position - window + 1) : 0, end = position + 1;
  size_t d = keys.head_dim;
  int g = 0;
  for (; g + HEADS_AT_ONCE <= group; g += HEADS_AT_ONCE)
    attend_heads<HEADS_AT_ONCE>(q + g * d, keys, values, head, first, end, scoring, scratch, out + g * d);
  if (group - g == 2) attend_heads<2>(q + g * d, keys, values, head, first, end, scoring, scratch, out + g * d);
  if (group - g == 1) attend_heads<1>(q + g * d, keys, values, head, first, end, scoring, scratch, out + g * d);
}

}  // namespace loraplex
