// One forward pass as one call: embed, layers, norm, logits, for decode rows and prefill chunks alike.
#pragma once

#include <vector>

#include "attention.h"
#include "lora.h"
#include "matmul.h"
#include "rows.h"
#include "team.h"

namespace loraplex {

// The structs up to `Batch` are filled in by native.py, field by field in this order.

struct Layer {
  const void* input_norm;  // vectors of the storage type
  const void* post_norm;
  const void* q_norm;  // or null
  const void* k_norm;
  Matrix qkv, o, gate_up, down;
  void* keys;  // [blocks][kv_heads][block_size][head_dim], storage type
  void* values;
  int32_t window;  // 0 sees all
  int32_t reserved;
};

struct Model {
  const Layer* layers;
  const void* embed;  // dense panels when tied, else rows [vocab][hidden]
  const void* norm;
  Matrix lm_head;
  const float* cos;  // [positions][head_dim / 2]
  const float* sin;
  AdapterTable adapters;
  int32_t num_layers, hidden, intermediate, heads, kv_heads, head_dim, block_size, threads;
  float eps, attention_scale;
  int32_t embed_in_panels, bf16_storage;
};

// See loraplex_model.batch.ForwardBatch.
struct Batch {
  const int32_t* tokens;
  const int32_t* positions;
  const int32_t* query_starts;
  const int32_t* block_tables;
  const int32_t* mix_starts;
  const int32_t* mix_slots;
  const float* mix_weights;
  const int32_t* logit_rows;
  int32_t num_tokens, num_sequences, table_width, num_logits;
};

// Merges neighbouring sequences with equal mixes into segments, and lays out the space for h.
inline Plan make_plan(const Batch& b, const int32_t* max_ranks) {
  Plan plan;
  for (int s = 0; s < b.num_sequences; s++) {
    int begin = b.mix_starts[s], end = b.mix_starts[s + 1], count = end - begin;
    if (!count) continue;
    bool same = s > 0 && b.mix_starts[s] - b.mix_starts[s - 1] == count;
    for (int i = 0; same && i < count; i++)
      same = b.mix_slots[begin + i] == b.mix_slots[begin - count + i] &&
             b.mix_weights[begin + i] == b.mix_weights[begin - count + i];
    if (same) {
      plan.segments.back().end = b.query_starts[s + 1];
      continue;
    }
    int first_term = plan.terms.size();
    for (int i = begin; i < end; i++) plan.terms.push_back({b.mix_slots[i], b.mix_weights[i], 0});
    plan.segments.push_back({b.query_starts[s], b.query_starts[s + 1], first_term, int(plan.terms.size())});
  }
  for (const Segment& segment : plan.segments)
    for (int t = segment.term_begin; t < segment.term_end; t++) {
      plan.terms[t].h = plan.h_size;
      plan.h_size += size_t(segment.end - segment.first) * max_ranks[plan.terms[t].slot];
    }
  return plan;
}

// Memory that grows to the largest pass and is kept from one to the next. Never initialised.
class Buffer {
 public:
  float* data() { return floats_.get(); }
  void reserve(size_t size) {
    if (size <= size_) return;
    floats_.reset(new float[size]);
    size_ = size;
  }

 private:
  std::unique_ptr<float[]> floats_;
  size_t size_ = 0;
};

struct Workspace {
  Buffer x, normed, qkv, attended, added, gate_up, gated, h, scores, lora;
};

// The pass, for storage type T of dense weights, adapters and cache. Sums and activations are float.
template <class T>
class Pass {
 public:
  Pass(const Model& model, const Batch& batch, Workspace& workspace, float* logits)
      : m(model), b(batch), w(workspace), logits_(logits), plan_(make_plan(batch, model.adapters.max_ranks)),
        team_(16 * model.num_layers + 8), sequence_(batch.num_tokens) {
    size_t rows = b.num_tokens;
    q_size_ = m.heads * m.head_dim;
    kv_size_ = m.kv_heads * m.head_dim;
    w.x.reserve(rows * m.hidden);
    w.normed.reserve(rows * m.hidden);
    w.qkv.reserve(rows * (q_size_ + 2 * kv_size_));
    w.attended.reserve(rows * q_size_);
    w.added.reserve(rows * m.hidden);
    w.gate_up.reserve(rows * 2 * m.intermediate);
    w.gated.reserve(rows * m.intermediate);
    w.h.reserve(3 * plan_.h_size);
    longest_ = *std::max_element(b.positions, b.positions + b.num_tokens) + 1;
    w.scores.reserve(3 * longest_ * m.threads);
    int widest = std::max({m.hidden, q_size_, m.intermediate}), rank = 0;
    for (const Term& term : plan_.terms) rank = std::max(rank, m.adapters.max_ranks[term.slot]);
    lora_scratch_ = plan_.empty() ? 0 : lora_scratch(widest, rank);
    w.lora.reserve(lora_scratch_ * m.threads);
    for (int s = 0; s < b.num_sequences; s++)
      for (int t = b.query_starts[s]; t < b.query_starts[s + 1]; t++) sequence_[t] = s;
    int ff = m.intermediate;
    sites_[0] = site({3, {0, 1, 2}, {0, q_size_, q_size_ + kv_size_}, {q_size_, kv_size_, kv_size_}});
    sites_[1] = site({1, {3}, {0}, {m.hidden}});
    sites_[2] = site({2, {4, 5}, {0, ff}, {ff, ff}});
    sites_[3] = site({1, {6}, {0}, {m.hidden}});
  }

  void run() {
#pragma omp parallel num_threads(m.threads)
    {
      int phase = 0;
      team_.run(phase, b.num_tokens, [&](int t) { embed(t); });
      for (int l = 0; l < m.num_layers; l++) {
        const Layer& layer = m.layers[l];
        project(phase, layer.qkv, sites_[0], l, w.normed.data(), w.qkv.data());
        team_.run(phase, b.num_tokens, [&](int t) { rotate_and_cache(layer, t); });
        team_.run(phase, b.num_tokens * m.kv_heads, [&](int unit) { attention(layer, unit); });
        project(phase, layer.o, sites_[1], l, w.attended.data(), w.added.data());
        team_.run(phase, b.num_tokens, [&](int t) { add_and_norm(t, layer.post_norm); });
        project(phase, layer.gate_up, sites_[2], l, w.normed.data(), w.gate_up.data());
        team_.run(phase, b.num_tokens, [&](int t) { gate(t); });
        project(phase, layer.down, sites_[3], l, w.gated.data(), w.added.data());
        const void* next = l + 1 < m.num_layers ? m.layers[l + 1].input_norm : m.norm;
        team_.run(phase, b.num_tokens, [&](int t) { add_and_norm(t, next); });
      }
      team_.run(phase, b.num_logits, [&](int i) {  // gathers the wanted rows to the front of x
        std::copy_n(row(w.normed, b.logit_rows[i], m.hidden), m.hidden, row(w.x, i, m.hidden));
      });
      team_.run(phase, matmul_units(m.lm_head, b.num_logits), [&](int unit) {
        matmul_unit(m.lm_head, w.x.data(), b.num_logits, logits_, m.lm_head.out, unit);
      });
    }
  }

 private:
  struct Site {
    Fused fused;
    std::vector<LoraUnit> shrink, expand;
  };

  Site site(const Fused& fused) const {
    return {fused, plan_.shrink_units(fused, m.adapters), plan_.expand_units(fused)};
  }

  float* lora_space() { return w.lora.data() + omp_get_thread_num() * lora_scratch_; }

  static float* row(Buffer& rows, int t, int width) { return rows.data() + size_t(t) * width; }

  // y = W x + bias, then the adapters' deltas. Base rows are not touched by the second part.
  void project(int& phase, const Matrix& matrix, const Site& site, int layer, const float* x, float* y) {
    int shrinks = site.shrink.size();
    team_.run(phase, shrinks + matmul_units(matrix, b.num_tokens), [&](int unit) {
      if (unit < shrinks)
        shrink<T>(plan_, m.adapters, site.fused, layer, site.shrink[unit], x, matrix.in, w.h.data(),
                  lora_space());
      else
        matmul_unit(matrix, x, b.num_tokens, y, matrix.out, unit - shrinks);
    });
    if (plan_.empty()) return;
    team_.run(phase, site.expand.size(), [&](int unit) {
      expand<T>(plan_, m.adapters, site.fused, layer, site.expand[unit], w.h.data(), y, matrix.out,
                lora_space());
    });
  }

  void embed(int t) {
    float* x = row(w.x, t, m.hidden);
    const T* table = static_cast<const T*>(m.embed);
    size_t token = b.tokens[t];
    if (m.embed_in_panels) {
      const T* at = table + token / PANEL * PANEL * m.hidden + token % PANEL;
      for (int i = 0; i < m.hidden; i++) x[i] = load1(at + size_t(i) * PANEL);
    } else {
      for (int i = 0; i < m.hidden; i++) x[i] = load1(table + token * m.hidden + i);
    }
    norm(t, m.layers[0].input_norm);
  }

  void norm(int t, const void* weight) {
    rms_norm(row(w.x, t, m.hidden), static_cast<const T*>(weight), m.eps, m.hidden, row(w.normed, t, m.hidden));
  }

  void add_and_norm(int t, const void* weight) {
    add(row(w.x, t, m.hidden), row(w.added, t, m.hidden), m.hidden);
    norm(t, weight);
  }

  Pages<T> pages(void* data, int t) const {
    return {static_cast<T*>(data), b.block_tables + size_t(sequence_[t]) * b.table_width, m.block_size,
            m.kv_heads, m.head_dim};
  }

  void rotate_and_cache(const Layer& layer, int t) {
    int d = m.head_dim, position = b.positions[t];
    float* q = row(w.qkv, t, q_size_ + 2 * kv_size_);
    float *k = q + q_size_, *v = k + kv_size_;
    const float* cos = m.cos + size_t(position) * (d / 2);
    const float* sin = m.sin + size_t(position) * (d / 2);
    for (int head = 0; head < m.heads + m.kv_heads; head++) {
      float* x = q + head * d;
      const void* weight = head < m.heads ? layer.q_norm : layer.k_norm;
      if (weight) rms_norm(x, static_cast<const T*>(weight), m.eps, d, x);
      rotate(x, cos, sin, d / 2);
    }
    Pages<T> keys = pages(layer.keys, t), values = pages(layer.values, t);
    for (int head = 0; head < m.kv_heads; head++) {
      put(k + head * d, d, keys.at(position, head));
      put(v + head * d, d, values.at(position, head));
    }
  }

  void attention(const Layer& layer, int unit) {
    int t = unit / m.kv_heads, head = unit % m.kv_heads, group = m.heads / m.kv_heads;
    const float* q = row(w.qkv, t, q_size_ + 2 * kv_size_) + head * group * m.head_dim;
    float* out = row(w.attended, t, q_size_) + head * group * m.head_dim;
    attend(q, pages(layer.keys, t), pages(layer.values, t), head, group, b.positions[t], layer.window,
           m.attention_scale, w.scores.data() + omp_get_thread_num() * 3 * longest_, out);
  }

  void gate(int t) {
    float* both = row(w.gate_up, t, 2 * m.intermediate);
    silu_mul(both, both + m.intermediate, m.intermediate, row(w.gated, t, m.intermediate));
  }

  const Model& m;
  const Batch& b;
  Workspace& w;
  float* logits_;
  Plan plan_;
  Team team_;
  std::vector<int> sequence_;
  int q_size_, kv_size_;
  size_t longest_, lora_scratch_;
  Site sites_[4];
};

}  // namespace loraplex
