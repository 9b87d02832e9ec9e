// Changes that adapters make outside the matrix products of the layers, one row at a time: embeddings,
// norms, bottlenecks, and rows of the head. Called only for rows whose adapters have such a change.
#pragma once

#include "activations.h"
#include "lora.h"
#include "model.h"

namespace loraplex {

// x += w (A[token] B + rows[token]), summed over the terms.
template <class T>
inline void add_embedding(const Plan& plan, const Segment& segment, const SlotTable& table, int token,
                          int hidden, float* x, float* scratch) {
  for (int t = segment.term_begin; t < segment.term_end; t++) {
    const Term& term = plan.terms[t];
    const Entry& entry = table.at(term.slot, table.layers, EMBED_TOKENS);
    if (entry.a) {
      const T* a = static_cast<const T*>(entry.a) + size_t(token) * entry.rank;
      for (int r = 0; r < entry.rank; r++) scratch[r] = term.weight * load1(a + r);
      expand_rows<T, 1>(scratch, entry.rank, static_cast<const T*>(entry.b), hidden, entry.rank, hidden, x, hidden);
    }
    const int32_t *ids = entry.token_ids, *end = ids + entry.count;
    const int32_t* at = std::lower_bound(ids, end, token);
    if (at == end || *at != token) continue;
    const T* row = static_cast<const T*>(entry.rows) + size_t(at - ids) * hidden;
    for (int i = 0; i < hidden; i++) x[i] = multiply_add(term.weight, load1(row + i), x[i]);
  }
}

// out = vector + sum w delta: a norm's weight or bias as the adapters change it. `delta` is the field of
// their entries. Returns null if none has it.
template <class T>
inline const float* norm_vector(const Plan& plan, const Segment& segment, const SlotTable& table, int layer,
                                int site, const float* Entry::* delta, const T* vector, int width, float* out) {
  bool any = false;
  for (int t = segment.term_begin; t < segment.term_end; t++) {
    const Term& term = plan.terms[t];
    const float* own = table.at(term.slot, layer, site).*delta;
    if (!own) continue;
    if (!any)
      for (int i = 0; i < width; i++) out[i] = load1(vector + i);
    any = true;
    for (int i = 0; i < width; i++) out[i] = multiply_add(term.weight, own[i], out[i]);
  }
  return any ? out : nullptr;
}

// Norms `parts` vectors of a row, side by side in x, with a norm's weight and bias as the adapters of `segment`
// change them, which may be null. Those of the parts lie `stride` apart: 0 if they are the same.
template <class T>
inline void norm_vectors(const Model& m, const Plan& plan, const Segment* segment, const NormWeights& norm, int layer,
                         int site, const float* x, int parts, int width, int stride, float* scratch, float* out) {
  const T *weight = static_cast<const T*>(norm.weight), *bias = static_cast<const T*>(norm.bias);
  const float *own = nullptr, *own_bias = nullptr;
  if (segment) {
    int total = stride ? parts * stride : width;
    own = norm_vector(plan, *segment, m.adapters, layer, site, &Entry::bias, weight, total, scratch);
    if (bias)
      own_bias =
          norm_vector(plan, *segment, m.adapters, layer, site, &Entry::hidden_bias, bias, total, scratch + total);
  }
  auto apply = [&](auto* factors, auto* shifts) {
    for (int i = 0; i < parts; i++)
      norm_row(m, x + i * width, factors + i * stride, shifts ? shifts + i * stride : shifts, width, out + i * width);
  };
  if (own_bias)
    own ? apply(own, own_bias) : apply(weight, own_bias);
  else
    own ? apply(own, bias) : apply(weight, bias);
}

// The numbers of `Reads` in adapters/delta.py.
enum Reads { NORMED, OUTPUT, STREAM, INCOMING };

constexpr int HEAD_TOKENS = 4096;  // logits of one unit

// Number of floats of scratch memory that the functions here need: three states (`add_bottleneck`) and a
// row of bottleneck width, rank or logits.
inline size_t sites_scratch(int hidden, int widest) {
  return 3 * size_t(hidden) + std::max(widest, HEAD_TOKENS);
}

// added += w up(f(down(input))) for every term's bottleneck; `added` is the block's output, of which
// `residual_scale` times is added to the stream.
template <class T>
inline void add_bottleneck(const Plan& plan, const Segment& segment, const SlotTable& table, int layer,
                           int site, const float* stream, const float* normed, float residual_scale,
                           int hidden, float* added, float* scratch) {
  float *before = scratch, *input = scratch + hidden, *h = input + 2 * size_t(hidden);
  std::copy_n(added, hidden, before);
  for (int t = segment.term_begin; t < segment.term_end; t++) {
    const Term& term = plan.terms[t];
    const Entry& entry = table.at(term.slot, layer, site);
    if (!entry.a) continue;
    const float* read = entry.reads == NORMED ? normed : entry.reads == INCOMING ? stream : before;
    if (entry.reads == STREAM) {
      for (int i = 0; i < hidden; i++) input[hidden + i] = stream[i] + residual_scale * before[i];
      read = input + hidden;
    }
    split_rows<T>(read, 1, hidden, input);
    shrink_rows<1>(input, static_cast<const T*>(entry.a), hidden, entry.rank, 1.0f, h, entry.rank);
    for (int r = 0; r < entry.rank; r++) {
      float x = entry.hidden_bias ? h[r] + entry.hidden_bias[r] : h[r];
      h[r] = term.weight * activate(x, entry.activation);
    }
    if (entry.bias)
      for (int i = 0; i < hidden; i++) added[i] = multiply_add(term.weight, entry.bias[i], added[i]);
    expand_rows<T, 1>(h, entry.rank, static_cast<const T*>(entry.b), hidden, entry.rank, hidden, added, hidden);
  }
}

// logits[token] += w (rows[token] . x) for the tokens in [first, end) whose rows of the head are changed.
template <class T>
inline void add_head_rows(const Plan& plan, const Segment& segment, const SlotTable& table, int first, int end,
                          const float* x, int hidden, float* logits, float* scratch) {
  split_rows<T>(x, 1, hidden, scratch);
  float* dots = scratch + hidden;
  for (int t = segment.term_begin; t < segment.term_end; t++) {
    const Term& term = plan.terms[t];
    const Entry& entry = table.at(term.slot, table.layers, LM_HEAD);
    const int32_t *ids = entry.token_ids, *stop = ids + entry.count;
    const int32_t *from = std::lower_bound(ids, stop, first), *to = std::lower_bound(from, stop, end);
    const T* rows = static_cast<const T*>(entry.rows) + size_t(from - ids) * hidden;
    shrink_rows<1>(scratch, rows, hidden, to - from, term.weight, dots, 0);
    for (int i = 0; i < to - from; i++) logits[from[i]] += dots[i];
  }
}

}  // namespace loraplex
