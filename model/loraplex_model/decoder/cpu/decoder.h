// One forward pass as one call: embed, layers, norm, logits, for decode rows and prefill chunks alike.
//
// A pass is a sequence of phases, and a phase a set of independent units of work (`Team`). Units are rows,
// rows and heads, or panels of a matrix, so which thread computes one never changes a result. The steps
// in which families differ are chosen once for a phase or a row.
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "attending.h"
#include "experts.h"
#include "gated.h"
#include "model.h"
#include "product.h"
#include "sites.h"
#include "team.h"

namespace loraplex {

// One pass. T is the storage type of dense weights, adapters and cache; X the type in which rows are
// multiplied with matrices. Sums and all other arithmetic are float.
template <class T, class X>
class Pass {
 public:
  Pass(const Model& model, const Batch& batch, Workspace& workspace, float* logits, float* states)
      : m(model), b(batch), w(workspace), logits_(logits), states_(states), sequence_(sequences(batch)),
        plan_(make_plan(batch, model.adapters, sequence_)),
        head_plan_(make_plan(batch, model.adapters, logit_sequences(batch, sequence_))),
        experts_(model, workspace, plan_, batch.num_tokens),
        attention_(model, batch, sequence_, workspace.scores),
        team_(std::min(model.threads, processors())),
        at_once_(TILED<X> || batch.num_tokens >= 32 * model.threads ? TILE_ROWS : 1) {
    size_t rows = b.num_tokens;
    q_size_ = m.heads * m.head_dim;
    kv_size_ = m.kv_heads * m.head_dim;
    w.x.reserve(rows * m.hidden);
    w.normed.reserve(rows * m.hidden);
    qkv_stride_ = row_stride(q_size_ + 2 * kv_size_);
    out_stride_ = row_stride(m.hidden);
    w.qkv.reserve(rows * qkv_stride_);
    w.attended.reserve(rows * q_size_);
    w.added.reserve(rows * out_stride_);
    if (m.parallel) w.parallel.reserve(rows * out_stride_);
    gate_up_stride_ = row_stride((m.gated ? 2 : 1) * m.intermediate);
    w.gate_up.reserve(rows * gate_up_stride_);
    w.gated.reserve(rows * m.intermediate);
    w.h.reserve(MAX_PARTS * std::max(plan_.h_size, head_plan_.h_size));
    int widest = std::max({m.hidden, q_size_, m.intermediate});
    gained_ = plan_.uses & IN_GAIN ? rows * widest : 0;
    w.gained.reserve(MAX_PARTS * gained_);
    if (gained_)
      for (InputRows& inputs : w.gained_inputs) Multiplied<X>::reserve(inputs, rows, widest);
    Multiplied<X>::reserve(w.normed_inputs, rows, m.hidden);
    Multiplied<X>::reserve(w.attended_inputs, rows, q_size_);
    if (!m.num_experts) Multiplied<X>::reserve(w.gated_inputs, rows, m.intermediate);
    Multiplied<X>::reserve(w.head_inputs, b.num_logits, m.hidden);
    scratch_ = plan_.segments.empty()
                   ? 0
                   : std::max(lora_scratch(widest, plan_.max_rank),
                              sites_scratch(widest, widest_site(plan_, model.adapters)));
    if (m.num_experts) scratch_ = std::max(scratch_, experts_scratch(m, plan_.max_rank));
    w.lora.reserve(scratch_ * m.threads);
    product({{Q_PROJ, q_size_}, {K_PROJ, kv_size_}, {V_PROJ, kv_size_}});
    product({{O_PROJ, m.hidden}});
    if (m.gated)
      product({{GATE_PROJ, m.intermediate}, {UP_PROJ, m.intermediate}});
    else
      product({{UP_PROJ, m.intermediate}});
    product({{DOWN_PROJ, m.hidden}});
    products_.emplace_back(head_plan_, m.adapters, Fused{1, {LM_HEAD}, {0}, {m.lm_head.out}}, -1, b.num_logits,
                           m.lm_head.out, HEAD, LORA_UNITS<X>);
  }

  void run() {
    team_.pass([&] {
      typename Multiplied<X>::Registers registers;
      int phase = 0;
      team_.run(phase, groups(b.num_tokens), [&](int group) {
        each_row(group, b.num_tokens, [&](int t) { embed(t); });
        put_group(w.normed_inputs, group, b.num_tokens, w.normed, m.hidden);
      });
      for (int l = 0; l < m.num_layers; l++) layer(phase, l);
      team_.run(phase, b.num_states, [&](int i) {
        std::copy_n(row(w.normed, b.state_rows[i], m.hidden), m.hidden, states_ + size_t(i) * m.hidden);
      });
      team_.run(phase, groups(b.num_logits), [&](int group) {  // the rows whose logits are wanted, to the front of x
        each_row(group, b.num_logits, [&](int i) {
          std::copy_n(row(w.normed, b.logit_rows[i], m.hidden), m.hidden, row(w.x, i, m.hidden));
        });
        put_group(w.head_inputs, group, b.num_logits, w.x, m.hidden);
      });
      project(phase, m.lm_head, products_[FUSED_MATRICES], m.num_layers, w.x.data(), w.head_inputs, logits_,
              m.lm_head.out);
      int chunks = (m.vocab + HEAD_TOKENS - 1) / HEAD_TOKENS;
      if (head_plan_.uses & HEAD)
        team_.run(phase, b.num_logits * chunks, [&](int unit) { head_rows(unit / chunks, unit % chunks); });
      if (m.logit_scale != 1 || m.logit_softcap)
        team_.run(phase, b.num_logits * chunks, [&](int unit) { finish_logits(unit / chunks, unit % chunks); });
    });
  }

 private:
  // Attention and MLP of layer l, each closed by `end_block`. Parallel ones are closed together.
  void layer(int& phase, int l) {
    const Layer& layer = m.layers[l];
    project(phase, layer.qkv, products_[QKV], l, w.normed.data(), w.normed_inputs, w.qkv.data(), qkv_stride_);
    int at_once = b.num_tokens < 32 * m.threads ? 1 : 16;  // adjacent positions share lines of the cache
    team_.run(phase, (b.num_tokens + at_once - 1) / at_once, [&](int unit) {
      int end = std::min(b.num_tokens, (unit + 1) * at_once);
      for (int t = unit * at_once; t < end; t++) rotate_and_cache(layer, l, t);
    });
    team_.run(phase, attention_.units(), [&](int unit) {
      attention_.run(layer, unit, w.qkv.data(), qkv_stride_, w.attended.data(), w.attended_inputs);
    });
    if (!attention_.puts_inputs())
      team_.run(phase, groups(b.num_tokens), [&](int group) {  // in the form in which their pairs are exchanged
        put_group(w.attended_inputs, group, b.num_tokens, w.attended, q_size_);
      });
    project(phase, layer.o, products_[O], l, w.attended.data(), w.attended_inputs, w.added.data(), out_stride_);
    if (!m.parallel)
      team_.run(phase, groups(b.num_tokens), [&](int group) {
        each_row(group, b.num_tokens, [&](int t) {
          attention_output(t, l);
          end_block(t, w.added, layer.post_norm, l, POST_ATTENTION_LAYERNORM);
        });
        put_group(w.normed_inputs, group, b.num_tokens, w.normed, m.hidden);
      });
    Buffer& out = m.parallel ? w.parallel : w.added;
    if (layer.router) {
      experts_.run(team_, phase, layer, l, w.normed.data(), out.data(), out_stride_, [&] { return scratch(); });
    } else if (gates_at_once(layer)) {
      gated_product(phase, layer.gate_up, l);
      project(phase, layer.down, products_[DOWN], l, w.gated.data(), w.gated_inputs, out.data(), out_stride_);
    } else {
      project(phase, layer.gate_up, products_[GATE_UP], l, w.normed.data(), w.normed_inputs, w.gate_up.data(),
              gate_up_stride_);
      int columns = TILED<X> ? GATED_COLUMNS : m.intermediate, pieces = (m.intermediate + columns - 1) / columns;
      team_.run(phase, groups(b.num_tokens) * pieces, [&](int unit) {
        int first = unit % pieces * columns;
        gate(unit / pieces, first, std::min(first + columns, m.intermediate));
      });
      project(phase, layer.down, products_[DOWN], l, w.gated.data(), w.gated_inputs, out.data(), out_stride_);
    }
    bool last = l + 1 == m.num_layers;
    const NormWeights& next = last ? m.norm : m.layers[l + 1].input_norm;
    int next_site = last ? int(FINAL_NORM) : int(INPUT_LAYERNORM);
    team_.run(phase, groups(b.num_tokens), [&](int group) {
      each_row(group, b.num_tokens, [&](int t) {
        if (m.parallel) attention_output(t, l);
        block_output(t, layer.mlp_output_norm, l, MLP_OUTPUT_NORM, MLP_BOTTLENECK, out);
        if (m.parallel) add(row(w.x, t, m.hidden), row(w.added, t, out_stride_), m.hidden);
        end_block(t, out, next, l + 1, next_site);
      });
      put_group(w.normed_inputs, group, b.num_tokens, w.normed, m.hidden);
    });
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
                           FACTORS | GAIN | IN_GAIN, LORA_UNITS<X>);
  }

  float* scratch() { return w.lora.data() + Team::index() * scratch_; }

  static float* row(Buffer& rows, int t, int width) { return rows.data() + size_t(t) * width; }

  // Units of phases that compute whole rows: groups of rows, whose inputs of products share lines of the cache.
  int groups(int rows) const { return (rows + at_once_ - 1) / at_once_; }

  template <class Use>
  void each_row(int group, int rows, Use use) const {
    int end = std::min(rows, (group + 1) * at_once_);
    for (int t = group * at_once_; t < end; t++) use(t);
  }

  // Rounds the rows of a group for products, or columns [first, end) of them.
  void put_group(InputRows& inputs, int group, int rows, Buffer& x, int width, int first = 0, int end = INT_MAX) const {
    int t = group * at_once_, used = std::min(at_once_, rows - t), count = std::min(end, width) - first;
    Multiplied<X>::put_group(inputs, t, used, first, count, row(x, t, width) + first, width);
  }

  // y = W x + bias, then the adapters' changes, which leave base rows untouched. `inputs` are the rows of x for
  // products of bfloat16; rows of y are `y_stride` apart.
  void project(int& phase, const Matrix& matrix, const Product& product, int layer, const float* x,
               InputRows& inputs, float* y, size_t y_stride) {
    bool gains = product.plan->uses & IN_GAIN && product.fused_index >= 0;
    if (gains) gain(phase, product, layer, x, matrix.in);
    auto rows = Multiplied<X>::rows(x, inputs);
    int shrinks = product.shrink.size(), units = 0;
    for (const Product::Run& run : product.runs) units += matmul_units(run.tile, rows);
    AdapterWork<T, X> work{product, m.adapters, layer, matrix.in, w.h.data(), y, y_stride};
    if (product.joins) {  // the product's units need all of A x
      team_.run(phase, shrinks, [&](int unit) { work.shrink_unit(unit, rows, scratch()); });
      shrinks = 0;
    }
    team_.run(phase, shrinks + units, [&](int unit) {
      // Shrinks are spread evenly among all units, so that each thread's range has its share.
      auto shrinks_before = [&](int64_t end) { return shrinks ? int(end * shrinks / (shrinks + units)) : 0; };
      int shrink = shrinks_before(unit);
      if (shrinks_before(unit + 1) > shrink) return work.shrink_unit(shrink, rows, scratch());
      unit -= shrink;
      const Product::Run* run = product.runs.data();
      for (int own; unit >= (own = matmul_units(run->tile, rows)); run++) unit -= own;
      const Matrix* dense = run->merged < 0 ? nullptr : m.adapters.dense(run->merged, layer, product.fused_index);
      bool gained = run->part >= 0 && gains_input(product, *product.plan->segment(run->tile.first), layer, run->part);
      auto from = gained ? gained_rows(run->part, matrix.in) : rows;
      matmul_unit(dense ? *dense : matrix, run->tile, from, y, y_stride, unit);
      if (product.joins) work.join(run->tile, rows, unit, scratch());
    });
    if (product.expand.empty()) return;
    team_.run(phase, product.expand.size(), [&](int unit) { work.expand_unit(unit, scratch()); });
  }

  // Whether gate, up and activation are one product.
  bool gates_at_once(const Layer& layer) const {
#if LORAPLEX_ORDER
    if constexpr (!std::is_same_v<X, float>) {
      return m.gated && gates_fit(layer.gate_up) && layer.down.kind == Kind::nf4_packed &&
             products_[GATE_UP].is_whole() && products_[GATE_UP].expand.empty() && products_[DOWN].is_whole();
    }
#endif
    return false;
  }

  // Fills `gated_inputs`.
  void gated_product(int& phase, const Matrix& gate_up, int layer) {
#if LORAPLEX_ORDER
    if constexpr (!std::is_same_v<X, float>) {
      Inputs x = w.normed_inputs.get(), out = w.gated_inputs.get();
      const Product& product = products_[GATE_UP];
      AdapterWork<T, X> work{product, m.adapters, layer, gate_up.in, w.h.data(), nullptr, 0};
      team_.run(phase, product.shrink.size(), [&](int unit) { work.shrink_unit(unit, x, scratch()); });
      team_.run(phase, gated_units(gate_up, b.num_tokens),
                [&](int unit) { gated_unit(gate_up, m.activation, b.num_tokens, x, out, work, unit); });
    }
#endif
  }

  typename Multiplied<X>::Rows gained_rows(int part, int in) {
    return Multiplied<X>::rows(w.gained.data() + part * gained_, w.gained_inputs[part], in);
  }

  // The inputs times the gains of each projection's adapters, for the rows that have any.
  void gain(int& phase, const Product& product, int layer, const float* x, int in) {
    team_.run(phase, b.num_tokens, [&](int t) { gain_inputs(product, layer, t, x, in); });
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
      Multiplied<X>::put_row(w.gained_inputs[part], t, in, out);
    }
  }

  // The segment of row t, or null if its adapters have no change of the sort `use`.
  const Segment* adapted(int t, int use) const {
    const Segment* segment = plan_.segment(t);
    return segment && segment->uses & use ? segment : nullptr;
  }

  void embed(int t) {
    float* x = row(w.x, t, m.hidden);
    size_t token = b.tokens[t];
    if (token >= size_t(m.vocab)) {  // a virtual token of the row's only adapter
      const T* prompt = static_cast<const T*>(m.adapters.prompts[plan_.terms[plan_.segment(t)->term_begin].slot]);
      for (int i = 0; i < m.hidden; i++) x[i] = load1(prompt + (token - m.vocab) * m.hidden + i);
    } else {
      read_embedding<T>(m, token, x);
    }
    if (const Segment* segment = adapted(t, EMBEDDING); segment && token < size_t(m.vocab))
      add_embedding<T>(plan_, *segment, m.adapters, token, m.hidden, x, scratch());
    if (m.embed_scale != 1 && (token < size_t(m.vocab) || m.scaled_prompts)) scale_row(x, m.embed_scale, m.hidden);
    norm(t, m.layers[0].input_norm, 0, INPUT_LAYERNORM);
  }

  void norm_parts(int t, const NormWeights& norm, int layer, int site, const float* x, int parts, int width,
                  int stride, float* out) {
    norm_vectors<T>(m, plan_, adapted(t, NORM), norm, layer, site, x, parts, width, stride, scratch(), out);
  }

  // The residual stream as a block reads it: normed, or as it is in decoders that norm outputs only.
  void norm(int t, const NormWeights& norm, int layer, int site) {
    const float* x = row(w.x, t, m.hidden);
    float* out = row(w.normed, t, m.hidden);
    if (norm.weight)
      norm_parts(t, norm, layer, site, x, 1, m.hidden, 0, out);
    else
      std::copy_n(x, m.hidden, out);
  }

  // Turns the output of a block of `layer` into what it adds to the residual stream.
  void block_output(int t, const NormWeights& norm, int layer, int site, int bottleneck, Buffer& outputs) {
    float* out = row(outputs, t, out_stride_);
    if (norm.weight) norm_parts(t, norm, layer, site, out, 1, m.hidden, 0, out);
    if (const Segment* segment = adapted(t, BOTTLENECK))
      add_bottleneck<T>(plan_, *segment, m.adapters, layer, bottleneck, row(w.x, t, m.hidden),
                        row(w.normed, t, m.hidden), m.residual_scale, m.hidden, out, scratch());
    if (m.residual_scale != 1) scale_row(out, m.residual_scale, m.hidden);
  }

  void attention_output(int t, int l) {
    block_output(t, m.layers[l].attention_output_norm, l, ATTENTION_OUTPUT_NORM, ATTENTION_BOTTLENECK, w.added);
  }

  // Adds a block's output to the residual stream, and norms that for the next block.
  void end_block(int t, Buffer& outputs, const NormWeights& next, int norm_layer, int norm_site) {
    add(row(w.x, t, m.hidden), row(outputs, t, out_stride_), m.hidden);
    norm(t, next, norm_layer, norm_site);
  }

  void head_rows(int i, int chunk) {
    const Segment* segment = head_plan_.segment(i);
    if (!segment || !(segment->uses & HEAD)) return;
    int first = chunk * HEAD_TOKENS;
    add_head_rows<T>(head_plan_, *segment, m.adapters, first, std::min(first + HEAD_TOKENS, m.vocab),
                     row(w.x, i, m.hidden), m.hidden, logits_ + size_t(i) * m.lm_head.out, scratch());
  }

  void finish_logits(int i, int chunk) const {
    int first = chunk * HEAD_TOKENS, count = std::min(HEAD_TOKENS, m.vocab - first);
    float* logits = logits_ + size_t(i) * m.lm_head.out + first;
    if (m.logit_softcap)
      cap_row(logits, count, m.logit_scale, m.logit_softcap);
    else
      scale_row(logits, m.logit_scale, count);
  }

  void head_norms(int t, const NormWeights& norm, int layer, int site, float* x, int heads) {
    if (!norm.weight) return;
    if (m.qk_span == ALL_SPAN)
      norm_parts(t, norm, layer, site, x, 1, heads * m.head_dim, 0, x);
    else
      norm_parts(t, norm, layer, site, x, heads, m.head_dim, m.qk_span == EACH_SPAN ? m.head_dim : 0, x);
  }

  void rotate_and_cache(const Layer& layer, int l, int t) {
    float* q = row(w.qkv, t, qkv_stride_);
    float *k = q + q_size_, *v = k + kv_size_;
    head_norms(t, layer.q_norm, l, Q_NORM, q, m.heads);
    head_norms(t, layer.k_norm, l, K_NORM, k, m.kv_heads);
    rotate_heads(m, layer, b.positions[t], b.num_long && b.is_long[sequence_[t]], q);
    if (m.query_scale) scale_row(q, m.query_scale[b.positions[t]], q_size_);
    attention_.write(layer, t, k, v);
  }

  void gate(int group, int first, int end) {
    each_row(group, b.num_tokens, [&](int t) {
      const float* gate = row(w.gate_up, t, gate_up_stride_) + first;
      const float* up = m.gated ? gate + m.intermediate : nullptr;
      activate_row(gate, up, m.activation, end - first, row(w.gated, t, m.intermediate) + first);
    });
    put_group(w.gated_inputs, group, b.num_tokens, w.gated, m.intermediate, first, end);
  }

  const Model& m;
  const Batch& b;
  Workspace& w;
  float *logits_, *states_;
  std::vector<int> sequence_;
  Plan plan_, head_plan_;
  Experts<T, X> experts_;
  Attention<T, X> attention_;
  Team team_;
  int at_once_;  // rows of a unit in phases that compute whole rows
  int q_size_, kv_size_, qkv_stride_, gate_up_stride_, out_stride_;  // strides of rows in floats
  size_t scratch_, gained_;
  std::vector<Product> products_;
};

}  // namespace loraplex
