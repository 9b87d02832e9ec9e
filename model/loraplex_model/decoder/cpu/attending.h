// The attention of a pass: its units of work, and the writing of keys and values, by the type X of products.
#pragma once

#include <vector>

#include "attention_bf16.h"
#include "model.h"
#include "team.h"

namespace loraplex {

// What both types share: the sequence of each row, and the scratch of each thread.
struct AttentionRows {
  const Model& m;
  const Batch& b;
  const std::vector<int>& sequence;
  Buffer& scratch;
  size_t scratch_size = 0;  // floats of a thread

  int group() const { return m.heads / m.kv_heads; }
  const int32_t* blocks(int t) const { return b.block_tables + size_t(sequence[t]) * b.table_width; }
  Scoring scoring() const { return {m.attention_scale, m.attention_softcap}; }
  float* own_scratch() const { return scratch.data() + Team::index() * scratch_size; }
  void reserve(size_t floats) {
    scratch_size = floats;
    scratch.reserve(floats * m.threads);
  }
};

template <class T, class X>
class Attention;

// One query and one key/value head at a time.
template <class T>
class Attention<T, float> {
 public:
  Attention(const Model& m, const Batch& b, const std::vector<int>& sequence, Buffer& scratch)
      : rows_{m, b, sequence, scratch} {
    size_t longest = *std::max_element(b.positions, b.positions + b.num_tokens) + 1;
    rows_.reserve(HEADS_AT_ONCE * longest);
  }

  int units() const { return rows_.b.num_tokens * rows_.m.kv_heads; }
  bool puts_inputs() const { return true; }

  // Writes the keys and values [kv_heads][head_dim] of row t to the cache.
  void write(const Layer& layer, int t, const float* k, const float* v) const {
    int d = rows_.m.head_dim, position = rows_.b.positions[t];
    Pages<T> keys = pages(layer.keys, t), values = pages(layer.values, t);
    for (int head = 0; head < rows_.m.kv_heads; head++) {
      put(k + head * d, d, keys.at(position, head));
      put(v + head * d, d, values.at(position, head));
    }
  }

  // Attention of a unit: the queries begin at q, `stride` floats apart, the outputs at out.
  void run(const Layer& layer, int unit, const float* q, size_t stride, float* out, InputRows&) const {
    const Model& m = rows_.m;
    int t = unit / m.kv_heads, head = unit % m.kv_heads, group = rows_.group(), first = head * group * m.head_dim;
    attend(q + t * stride + first, pages(layer.keys, t), pages(layer.values, t), head, group, rows_.b.positions[t],
           layer.window, rows_.scoring(), rows_.own_scratch(), out + size_t(t) * m.heads * m.head_dim + first);
  }

 private:
  Pages<T> pages(void* data, int t) const {
    return {static_cast<T*>(data), rows_.blocks(t), rows_.m.block_size, rows_.m.kv_heads, rows_.m.head_dim};
  }

  AttentionRows rows_;
};

#if LORAPLEX_ORDER

// Up to QUERY_ROWS rows, which are a sequence's queries times a group's heads, and one key/value head at a time.
template <>
class Attention<bf16, bf16> {
 public:
  Attention(const Model& m, const Batch& b, const std::vector<int>& sequence, Buffer& scratch)
      : rows_{m, b, sequence, scratch} {
    rows_.reserve(attention_scratch(m.head_dim, m.block_size));
    // Large units read keys and values less often; but every thread needs some.
    int rows_of_all = b.num_tokens * rows_.group() * m.kv_heads;
    int at_once = rows_of_all < 8 * m.threads * QUERY_ROWS ? 2 * TILE_ROWS : QUERY_ROWS;
    for (int s = 0; s < b.num_sequences; s++) {
      int rows = (b.query_starts[s + 1] - b.query_starts[s]) * rows_.group();
      for (int first = 0; first < rows; first += at_once)
        runs_.push_back({b.query_starts[s], first, std::min(at_once, rows - first)});
    }
  }

  int units() const { return int(runs_.size()) * rows_.m.kv_heads; }

  void write(const Layer& layer, int t, const float* k, const float* v) const {
    PairedPages cache = pages(layer, t);
    for (int head = 0, d = rows_.m.head_dim; head < rows_.m.kv_heads; head++)
      cache.put(rows_.b.positions[t], head, k + head * d, v + head * d);
  }

  void run(const Layer& layer, int unit, const float* q, size_t stride, float* out, InputRows& inputs) const {
    const Model& m = rows_.m;
    const Run& run = runs_[unit / m.kv_heads];
    int head = unit % m.kv_heads, group = rows_.group();
    auto row = [&](int r) { return run.row + (run.first + r) / group; };
    auto column = [&](int r) { return (head * group + (run.first + r) % group) * m.head_dim; };
    auto to = [&](int r) { return out + size_t(row(r)) * m.heads * m.head_dim + column(r); };
    QueryRows queries = {q + run.row * stride + column(0) - run.first % group * m.head_dim, stride,
                         rows_.b.positions + run.row, group, run.first, run.count};
    attend_rows(queries, pages(layer, run.row), head, layer.window, rows_.scoring(), rows_.own_scratch(), to);
    if (puts_inputs())
      for (int r = 0; r < run.count; r++) inputs.put(row(r), column(r), m.head_dim, to(r));
  }

  // Whether `run` writes its outputs to `inputs`, too: not if units of several rows would write the same lines.
  bool puts_inputs() const { return ORDER != Order::TILES || rows_.b.num_tokens == 1; }

 private:
  struct Run {
    int row, first, count;  // the sequence's first row in the pass; the rows of the unit as of QueryRows
  };

  PairedPages pages(const Layer& layer, int t) const {
    return {static_cast<bf16*>(layer.keys), static_cast<bf16*>(layer.values), rows_.blocks(t), rows_.m.block_size,
            rows_.m.kv_heads, rows_.m.head_dim};
  }

  AttentionRows rows_;
  std::vector<Run> runs_;
};

#endif

}  // namespace loraplex
