// One forward pass as one call: embed, layers, norm, logits, for decode rows and prefill chunks alike.
//
// A pass is a sequence of phases, and a phase a set of independent units of work (`Team`). Units are rows,
// rows and heads, or panels of a matrix, so which thread computes one never changes a result.
#pragma once

#include <initializer_list>
#include <utility>
#include <vector>

#include "attention.h"
#include "sites.h"
#include "team.h"

namespace loraplex {

// `Layer` and `Model` are filled in by decoder/native.py through decoder/layout.py, which repeats the fields.

struct Layer {
  const void* input_norm;  // [hidden], of the storage type like the other norms
  const void* post_norm;   // [hidden]
  const void* q_norm;      // [head_dim], or null
  const void* k_norm;
  Matrix qkv, o, gate_up, down;
  void* keys;  // [blocks][kv_heads][block_size][head_dim], storage type
  void* values;
  int32_t window;  // 0 sees all
  int32_t reserved;
};

struct Model {
  const Layer* layers;
  const void* embed;  // dense panels if tied to the head, else rows [vocab][hidden]
  const void* norm;   // [hidden]
  Matrix lm_head;
  const float* cos;  // [positions][head_dim / 2]
  const float* sin;
  SlotTable adapters;
  int32_t num_layers, hidden, intermediate, heads, kv_heads, head_dim, block_size, threads;
  float eps, attention_scale;
  int32_t embed_in_panels, bf16_storage;
  int32_t vocab;
  int32_t positions;  // of cos and sin
  int32_t blocks;     // of each layer's keys and values
  int32_t reserved;
};

// Memory that grows to the size of the largest pass and is reused by later ones. Not initialised.
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

// The intermediate results of a pass, by name of the variable in the papers or of the adapters' step.
struct Workspace {
  Buffer x, normed, qkv, attended, added, gate_up, gated, gained, h, scores, lora;
};

// The plan of one matrix product with the adapters' changes. It is the same in every layer.
struct Product {
  // Rows that go through one matrix with one input. Base rows and rows of most adapters share a run; rows
  // with dense matrices of their own have another, and rows with scaled inputs one for each projection.
  struct Run {
    Tile tile;
    int merged;  // slot whose dense matrix replaces the base's, or -1
    int part;    // projection whose input is scaled, or -1
  };

  const Plan* plan;
  Fused fused;
  int fused_index;  // FusedMatrix; -1 for the head, which has no dense copies
  std::vector<Run> runs;
  std::vector<LoraUnit> shrink, expand;
  int units = 0;

  Product(const Plan& plan, const SlotTable& table, const Fused& fused, int fused_index, int rows, int out, int uses)
      : plan(&plan), fused(fused), fused_index(fused_index), shrink(shrink_units(plan, table, fused, uses & (FACTORS | HEAD))),
        expand(expand_units(plan, fused, uses)) {
    int begin = 0;
    auto add = [&](int first, int end, int column, int stop, int merged, int part) {
      if (first < end) runs.push_back({{first, end - first, column, stop}, merged, part});
    };
    for (const Segment& segment : plan.segments) {
      bool scaled = segment.uses & uses & IN_GAIN, dense = segment.merged >= 0 && fused_index >= 0;
      if (!dense && !scaled) continue;
      add(begin, segment.first, 0, out, -1, -1);
      begin = segment.end;
      if (dense) add(segment.first, segment.end, 0, out, segment.merged, -1);
      else
        for (int p = 0; p < fused.parts; p++)
          add(segment.first, segment.end, fused.column[p], fused.column[p] + fused.width[p], -1, p);
    }
    add(begin, rows, 0, out, -1, -1);
    for (const Run& run : runs) units += run.tile.units();
  }
};

// One pass. T is the storage type of dense weights, adapters and cache; sums and activations are float.
template <class T>
class Pass {
 public:
  Pass(const Model& model, const Batch& batch, Workspace& workspace, float* logits)
      : m(model), b(batch), w(workspace), logits_(logits), sequence_(sequences(batch)),
        plan_(make_plan(batch, model.adapters, sequence_)),
        head_plan_(make_plan(batch, model.adapters, logit_sequences(batch, sequence_))),
        team_(PHASES_PER_LAYER * model.num_layers + OTHER_PHASES) {
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
    w.h.reserve(MAX_PARTS * std::max(plan_.h_size, head_plan_.h_size));
    longest_ = *std::max_element(b.positions, b.positions + b.num_tokens) + 1;
    w.scores.reserve(HEADS_AT_ONCE * longest_ * m.threads);
    int widest = std::max({m.hidden, q_size_, m.intermediate});
    gained_ = plan_.uses & IN_GAIN ? rows * widest : 0;
    w.gained.reserve(MAX_PARTS * gained_);
    scratch_ = plan_.segments.empty()
                   ? 0
                   : std::max(lora_scratch(widest, plan_.max_rank), sites_scratch(widest, widest_site()));
    w.lora.reserve(scratch_ * m.threads);
    product({{Q_PROJ, q_size_}, {K_PROJ, kv_size_}, {V_PROJ, kv_size_}});
    product({{O_PROJ, m.hidden}});
    product({{GATE_PROJ, m.intermediate}, {UP_PROJ, m.intermediate}});
    product({{DOWN_PROJ, m.hidden}});
    products_.emplace_back(head_plan_, m.adapters, Fused{1, {LM_HEAD}, {0}, {m.lm_head.out}}, -1, b.num_logits,
                           m.lm_head.out, HEAD);
  }

  void run() {
#pragma omp parallel num_threads(m.threads)
    {
      int phase = 0;
      team_.run(phase, b.num_tokens, [&](int t) { embed(t); });
      for (int l = 0; l < m.num_layers; l++) {
        const Layer& layer = m.layers[l];
        project(phase, layer.qkv, products_[QKV], l, w.normed.data(), w.qkv.data());
        team_.run(phase, b.num_tokens, [&](int t) { rotate_and_cache(layer, l, t); });
        team_.run(phase, b.num_tokens * m.kv_heads, [&](int unit) { attention(layer, unit); });
        project(phase, layer.o, products_[O], l, w.attended.data(), w.added.data());
        team_.run(phase, b.num_tokens,
                  [&](int t) { add_and_norm(t, l, ATTENTION_BOTTLENECK, layer.post_norm, l, POST_ATTENTION_LAYERNORM); });
        project(phase, layer.gate_up, products_[GATE_UP], l, w.normed.data(), w.gate_up.data());
        team_.run(phase, b.num_tokens, [&](int t) { gate(t); });
        project(phase, layer.down, products_[DOWN], l, w.gated.data(), w.added.data());
        bool last = l + 1 == m.num_layers;
        const void* next = last ? m.norm : m.layers[l + 1].input_norm;
        int next_site = last ? int(FINAL_NORM) : int(INPUT_LAYERNORM);
        team_.run(phase, b.num_tokens,
                  [&](int t) { add_and_norm(t, l, MLP_BOTTLENECK, next, l + 1, next_site); });
      }
      team_.run(phase, b.num_logits, [&](int i) {  // gathers the rows whose logits are wanted at the front of x
        std::copy_n(row(w.normed, b.logit_rows[i], m.hidden), m.hidden, row(w.x, i, m.hidden));
      });
      project(phase, m.lm_head, products_[FUSED_MATRICES], m.num_layers, w.x.data(), logits_);
      if (head_plan_.uses & HEAD) {
        int chunks = (m.vocab + HEAD_TOKENS - 1) / HEAD_TOKENS;
        team_.run(phase, b.num_logits * chunks, [&](int unit) { head_rows(unit / chunks, unit % chunks); });
      }
    }
  }

 private:
  // Bounds on the phases: a projection takes up to three of them, a layer 17 in all.
  static constexpr int PHASES_PER_LAYER = 20, OTHER_PHASES = 16;

  // The sequence of each row.
  static std::vector<int> sequences(const Batch& b) {
    std::vector<int> sequence(b.num_tokens);
    for (int s = 0; s < b.num_sequences; s++)
      std::fill(sequence.begin() + b.query_starts[s], sequence.begin() + b.query_starts[s + 1], s);
    return sequence;
  }

  // The sequence of each row whose logits are wanted.
  static std::vector<int> logit_sequences(const Batch& b, const std::vector<int>& sequence) {
    std::vector<int> wanted(b.num_logits);
    for (int i = 0; i < b.num_logits; i++) wanted[i] = sequence[b.logit_rows[i]];
    return wanted;
  }

  // Adds the next fused matrix: projections side by side, each with its width.
  void product(std::initializer_list<std::pair<LayerSite, int>> projections) {
    Fused fused = {};
    int out = 0;
    for (auto [projection, width] : projections) {
      fused.projection[fused.parts] = projection;
      fused.column[fused.parts] = out;
      fused.width[fused.parts++] = width;
      out += width;
    }
    products_.emplace_back(plan_, m.adapters, fused, int(products_.size()), b.num_tokens, out,
                           FACTORS | GAIN | IN_GAIN);
  }

  // The largest width of a bottleneck, or rank at the embeddings, among the adapters of this pass.
  int widest_site() const {
    int widest = 0;
    if (!(plan_.uses & (BOTTLENECK | EMBEDDING))) return widest;
    for (const Term& term : plan_.terms) {
      widest = std::max(widest, m.adapters.at(term.slot, m.num_layers, EMBED_TOKENS).rank);
      for (int l = 0; l < m.num_layers; l++)
        for (int site : {ATTENTION_BOTTLENECK, MLP_BOTTLENECK})
          widest = std::max(widest, m.adapters.at(term.slot, l, site).rank);
    }
    return widest;
  }

  float* scratch() { return w.lora.data() + omp_get_thread_num() * scratch_; }

  static float* row(Buffer& rows, int t, int width) { return rows.data() + size_t(t) * width; }

  // y = W x + bias, then the adapters' changes, which leave base rows untouched.
  void project(int& phase, const Matrix& matrix, const Product& product, int layer, const float* x, float* y) {
    if (product.plan->uses & IN_GAIN && product.fused_index >= 0)
      team_.run(phase, b.num_tokens, [&](int t) { gain_inputs(product, layer, t, x, matrix.in); });
    int shrinks = product.shrink.size();
    team_.run(phase, shrinks + product.units, [&](int unit) {
      if (unit < shrinks)
        return shrink<T>(*product.plan, m.adapters, product.fused, layer, product.shrink[unit], x, matrix.in,
                         w.h.data(), scratch());
      unit -= shrinks;
      const Product::Run* run = product.runs.data();
      for (; unit >= run->tile.units(); run++) unit -= run->tile.units();
      const Matrix* dense = run->merged < 0 ? nullptr : m.adapters.dense(run->merged, layer, product.fused_index);
      bool gained = run->part >= 0 && gains_input(product, *product.plan->segment(run->tile.first), layer, run->part);
      matmul_unit(dense ? *dense : matrix, run->tile, gained ? w.gained.data() + run->part * gained_ : x, y, matrix.out, unit);
    });
    if (product.expand.empty()) return;
    team_.run(phase, product.expand.size(), [&](int unit) {
      expand<T>(*product.plan, m.adapters, product.fused, layer, product.expand[unit], w.h.data(), y, matrix.out,
                scratch());
    });
  }

  bool gains_input(const Product& product, const Segment& segment, int layer, int part) const {
    for (int t = segment.term_begin; t < segment.term_end; t++)
      if (m.adapters.at(plan_.terms[t].slot, layer, product.fused.projection[part]).in_gain) return true;
    return false;
  }

  void gain_inputs(const Product& product, int layer, int t, const float* x, int in) {
    const Segment* segment = plan_.segment(t);
    if (!segment || !(segment->uses & IN_GAIN)) return;
    for (int part = 0; part < product.fused.parts; part++) {
      float* out = w.gained.data() + part * gained_ + size_t(t) * in;
      auto pick = [&](int slot) { return m.adapters.at(slot, layer, product.fused.projection[part]).in_gain; };
      if (blend_gains(plan_, *segment, in, pick, out))
        for (int i = 0; i < in; i++) out[i] *= x[size_t(t) * in + i];
    }
  }

  // The segment of row t, or null if its adapters have no change of the sort `use`.
  const Segment* adapted(int t, int use) const {
    const Segment* segment = plan_.segment(t);
    return segment && segment->uses & use ? segment : nullptr;
  }

  void embed(int t) {
    float* x = row(w.x, t, m.hidden);
    const T* table = static_cast<const T*>(m.embed);
    size_t token = b.tokens[t];
    if (token >= size_t(m.vocab)) {  // a virtual token of the row's only adapter
      const T* prompt = static_cast<const T*>(m.adapters.prompts[plan_.terms[plan_.segment(t)->term_begin].slot]);
      for (int i = 0; i < m.hidden; i++) x[i] = load1(prompt + (token - m.vocab) * m.hidden + i);
    } else if (m.embed_in_panels) {
      const T* at = table + token / PANEL * PANEL * m.hidden + token % PANEL;
      for (int i = 0; i < m.hidden; i++) x[i] = load1(at + size_t(i) * PANEL);
    } else {
      for (int i = 0; i < m.hidden; i++) x[i] = load1(table + token * m.hidden + i);
    }
    if (const Segment* segment = adapted(t, EMBEDDING); segment && token < size_t(m.vocab))
      add_embedding<T>(plan_, *segment, m.adapters, token, m.hidden, x, scratch());
    norm(t, m.layers[0].input_norm, 0, INPUT_LAYERNORM);
  }

  // Norms a vector of row t with `weight` as the row's adapters change it.
  void norm_with(int t, const void* weight, int layer, int site, const float* x, int width, float* out) {
    const T* base = static_cast<const T*>(weight);
    if (const Segment* segment = adapted(t, NORM))
      if (const float* own = norm_weight(plan_, *segment, m.adapters, layer, site, base, width, scratch()))
        return rms_norm(x, own, m.eps, width, out);
    rms_norm(x, base, m.eps, width, out);
  }

  void norm(int t, const void* weight, int layer, int site) {
    norm_with(t, weight, layer, site, row(w.x, t, m.hidden), m.hidden, row(w.normed, t, m.hidden));
  }

  // Ends a block of `layer`: adds its output to the residual stream, and norms that for the next block.
  void add_and_norm(int t, int layer, int bottleneck, const void* weight, int norm_layer, int norm_site) {
    float *x = row(w.x, t, m.hidden), *added = row(w.added, t, m.hidden);
    if (const Segment* segment = adapted(t, BOTTLENECK))
      add_bottleneck<T>(plan_, *segment, m.adapters, layer, bottleneck, x, row(w.normed, t, m.hidden), m.hidden,
                        added, scratch());
    add(x, added, m.hidden);
    norm(t, weight, norm_layer, norm_site);
  }

  void head_rows(int i, int chunk) {
    const Segment* segment = head_plan_.segment(i);
    if (!segment || !(segment->uses & HEAD)) return;
    int first = chunk * HEAD_TOKENS;
    add_head_rows<T>(head_plan_, *segment, m.adapters, first, std::min(first + HEAD_TOKENS, m.vocab),
                     row(w.x, i, m.hidden), m.hidden, logits_ + size_t(i) * m.lm_head.out, scratch());
  }

  Pages<T> pages(void* data, int t) const {
    return {static_cast<T*>(data), b.block_tables + size_t(sequence_[t]) * b.table_width, m.block_size,
            m.kv_heads, m.head_dim};
  }

  void rotate_and_cache(const Layer& layer, int l, int t) {
    int d = m.head_dim, position = b.positions[t];
    float* q = row(w.qkv, t, q_size_ + 2 * kv_size_);
    float *k = q + q_size_, *v = k + kv_size_;
    const float* cos = m.cos + size_t(position) * (d / 2);
    const float* sin = m.sin + size_t(position) * (d / 2);
    for (int head = 0; head < m.heads + m.kv_heads; head++) {
      float* x = q + head * d;
      const void* weight = head < m.heads ? layer.q_norm : layer.k_norm;
      if (weight) norm_with(t, weight, l, head < m.heads ? Q_NORM : K_NORM, x, d, x);
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
           m.attention_scale, w.scores.data() + omp_get_thread_num() * HEADS_AT_ONCE * longest_, out);
  }

  void gate(int t) {
    float* both = row(w.gate_up, t, 2 * m.intermediate);
    silu_mul(both, both + m.intermediate, m.intermediate, row(w.gated, t, m.intermediate));
  }

  const Model& m;
  const Batch& b;
  Workspace& w;
  float* logits_;
  std::vector<int> sequence_;
  Plan plan_, head_plan_;
  Team team_;
  int q_size_, kv_size_;
  size_t longest_, scratch_, gained_;
  std::vector<Product> products_;
};

}  // namespace loraplex
