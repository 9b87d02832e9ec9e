// Causal attention within whole sequences and its derivative (FlashAttention, Dao et al., arXiv 2205.14135):
// scores exist for 32 queries at a time, and one number per query and head is kept.
#pragma once

#include <cmath>

#include "multiply.h"

#if LORAPLEX_ORDER
namespace loraplex {

constexpr int QUERIES = 32;  // of a block

// bf16 rows of all heads: head h of row t begins at `at + t * stride + h * width`.
template <class T>
struct Heads {
  T* at;
  int64_t stride;

  T* operator()(int64_t row, int head, int width) const { return at + row * stride + int64_t(head) * width; }
};

struct Attending {
  Heads<const bf16> q, k, v;
  int heads, kv_heads, width, window;  // a window of 0 is none
  float scale;
};

// The keys that a block of queries sees: whole steps of 32.
struct Seen {
  int first, steps;

  Seen(int query, int queries, int window) {
    first = window ? std::max(0, query - window + 1) / TILE_INPUTS * TILE_INPUTS : 0;
    steps = tiles(query + queries - first, TILE_INPUTS);
  }
  int keys() const { return steps * TILE_INPUTS; }
};

// Left tiles of a block's rows of one head: [2 groups][steps].
inline void block_rows(const bf16* from, int64_t stride, int rows, int width, int steps, bf16* to) {
  for (int g = 0; g < 2; g++)
    for (int s = 0; s < steps; s++)
      tile_of_rows(from + g * TILE_ROWS * stride + s * TILE_INPUTS, stride, std::max(0, rows - g * TILE_ROWS),
                   width - s * TILE_INPUTS, to + (g * steps + s) * TILE);
}

// Right tiles of keys as columns, [tiles of 16 keys][steps of the width].
inline void keys_as_columns(const bf16* from, int64_t stride, int keys, int width, int steps, bf16* to) {
  for (int t = 0; t < tiles(keys, TILE_INPUTS) * 2; t++)
    for (int s = 0; s < steps; s++)
      tile_of_columns(from + t * TILE_ROWS * stride + s * TILE_INPUTS, stride, width - s * TILE_INPUTS,
                      std::max(0, keys - t * TILE_ROWS), to + (t * steps + s) * TILE);
}

// Right tiles of keys as inputs, [tiles of 16 columns][steps of keys].
inline void keys_as_inputs(const bf16* from, int64_t stride, int keys, int width, bf16* to) {
  int steps = tiles(keys, TILE_INPUTS);
  for (int t = 0; t < tiles(width, TILE_INPUTS) * 2; t++)
    for (int s = 0; s < steps; s++)
      tile_of_pairs(from + s * TILE_INPUTS * stride + t * TILE_ROWS, stride, keys - s * TILE_INPUTS,
                    std::max(0, width - t * TILE_ROWS), to + (t * steps + s) * TILE);
}

// scores [32][keys] of a block's left tiles with keys as columns.
inline void block_scores(const bf16* left, const bf16* columns, int steps, const Seen& seen, float* scores) {
  for (int key = 0; key < seen.keys(); key += 32) {
    const bf16* b = columns + size_t(seen.first + key) / TILE_ROWS * steps * TILE;
    multiply<2, 2>(left, size_t(steps) * TILE, b, size_t(steps) * TILE, steps, scores + key, seen.keys(), false);
  }
}

// Softmax numerators of one query's scores, in place, zero for keys it does not see: e^(scale * score - shift).
// Returns their sum. Without `known`, the shift is the largest scaled score.
inline float weights_of(float* scores, const Seen& seen, int query, const Attending& a, bool known, float& shift) {
  int from = a.window ? std::max(0, query - a.window + 1 - seen.first) : 0, to = query - seen.first + 1;
  for (int i = 0; i < from; i++) scores[i] = -INFINITY;
  for (int i = to; i < seen.keys(); i++) scores[i] = -INFINITY;
  if (!known) {
    vf most = set1(-INFINITY);
    for (int i = 0; i < seen.keys(); i += 16) most = max(most, load(scores + i));
    shift = max_lane(most) * a.scale;
  }
  vf total = {};
  for (int i = 0; i < seen.keys(); i += 16) {
    vf s = load(scores + i), e = s == -INFINITY ? vf{} : exp(s * a.scale - shift);
    store(scores + i, e);
    total += e;
  }
  return sum(total);
}

// Left tiles [2 groups][steps] of floats [32][keys].
inline void as_left(const float* values, const Seen& seen, bf16* to) {
  for (int g = 0; g < 2; g++)
    for (int s = 0; s < seen.steps; s++)
      tile_of_rows(values + g * TILE_ROWS * seen.keys() + s * TILE_INPUTS, seen.keys(), TILE_ROWS, TILE_INPUTS,
                   to + (size_t(g) * seen.steps + s) * TILE);
}

// One head of a sequence of n rows from row `start`: writes out, and each query's log of its sum to `logs` [n].
inline void attend(const Attending& a, int start, int n, int head, const Heads<bf16>& out, float* logs,
                   Scratch<bf16>& small, Scratch<float>& wide) {
  int kv = head / (a.heads / a.kv_heads), steps = tiles(a.width, TILE_INPUTS), all = tiles(n, TILE_INPUTS);
  size_t area = size_t(all) * steps * 2 * TILE;
  bf16* columns = small.of(2 * area + size_t(2) * (steps + all) * TILE);
  bf16 *inputs = columns + area, *left = inputs + area, *weights = left + 2 * steps * TILE;
  float* scores = wide.of(size_t(QUERIES) * all * TILE_INPUTS + QUERIES * 32);
  float* c = scores + size_t(QUERIES) * all * TILE_INPUTS;
  keys_as_columns(a.k(start, kv, a.width), a.k.stride, n, a.width, steps, columns);
  keys_as_inputs(a.v(start, kv, a.width), a.v.stride, n, a.width, inputs);
  for (int query = 0; query < n; query += QUERIES) {
    int count = std::min(QUERIES, n - query);
    Seen seen(query, count, a.window);
    block_rows(a.q(start + query, head, a.width), a.q.stride, count, a.width, steps, left);
    block_scores(left, columns, steps, seen, scores);
    float shares[QUERIES];
    for (int r = 0; r < QUERIES; r++) {
      float* row = scores + size_t(r) * seen.keys();
      if (r >= count) {
        std::memset(row, 0, seen.keys() * sizeof(float));
        continue;
      }
      float shift = 0, total = weights_of(row, seen, query + r, a, false, shift);
      shares[r] = 1.0f / total;
      logs[query + r] = shift + std::log(total);
    }
    as_left(scores, seen, weights);
    for (int column = 0; column < a.width; column += 32) {
      const bf16* b = inputs + (size_t(column / TILE_ROWS) * all + seen.first / TILE_INPUTS) * TILE;
      multiply<2, 2>(weights, size_t(seen.steps) * TILE, b, size_t(all) * TILE, seen.steps, c, 32, false);
      for (int r = 0; r < count; r++) {
        for (int i = 0; i < 32; i += 16) store(c + r * 32 + i, load(c + r * 32 + i) * shares[r]);
        put_rows(c + r * 32, 32, 1, std::min(32, a.width - column), out(start + query + r, head, a.width) + column, 0,
                 false);
      }
    }
  }
}

// Rows of gradients of one sequence that `attend_back` writes, and the results that it reads.
struct Derivative {
  Heads<const bf16> out, to_out;
  Heads<bf16> to_q, to_k, to_v;
};

// The gradients of all queries' heads that share one head of keys.
class AttendBack {
 public:
  AttendBack(const Attending& a, const Derivative& d, int start, int n, int kv, Scratch<bf16>& small,
             Scratch<float>& wide)
      : a_(a), d_(d), start_(start), n_(n), kv_(kv), steps_(tiles(a.width, TILE_INPUTS)), all_(tiles(n, TILE_INPUTS)) {
    size_t area = size_t(all_) * steps_ * 2 * TILE, block = size_t(2) * steps_ * TILE;
    columns_ = small.of(3 * area + 4 * block + size_t(2) * all_ * TILE + 4 * TILE);
    values_ = columns_ + area;
    inputs_ = values_ + area;
    q_ = inputs_ + area;
    g_ = q_ + block;
    q_pairs_ = g_ + block;
    g_pairs_ = q_pairs_ + block;
    left_ = g_pairs_ + block;
    turned_ = left_ + size_t(2) * all_ * TILE;
    wide_ = steps_ * TILE_INPUTS;
    size_t sums = size_t(all_) * TILE_INPUTS * wide_, scores = size_t(QUERIES) * all_ * TILE_INPUTS;
    to_k_ = wide.of(2 * sums + 2 * scores + QUERIES * 32);
    to_v_ = to_k_ + sums;
    scores_ = to_v_ + sums;
    slopes_ = scores_ + scores;
    c_ = slopes_ + scores;
    std::memset(to_k_, 0, 2 * sums * sizeof(float));
  }

  void run(const float* logs, int64_t rows) {  // logs [heads][rows]
    int w = a_.width, shared = a_.heads / a_.kv_heads;
    keys_as_columns(a_.k(start_, kv_, w), a_.k.stride, n_, w, steps_, columns_);
    keys_as_columns(a_.v(start_, kv_, w), a_.v.stride, n_, w, steps_, values_);
    keys_as_inputs(a_.k(start_, kv_, w), a_.k.stride, n_, w, inputs_);
    for (int head = kv_ * shared; head < (kv_ + 1) * shared; head++)
      for (int query = 0; query < n_; query += QUERIES) block(head, query, logs + head * rows + start_);
    put_rows(to_k_, wide_, n_, w, d_.to_k(start_, kv_, w), d_.to_k.stride, false);
    put_rows(to_v_, wide_, n_, w, d_.to_v(start_, kv_, w), d_.to_v.stride, false);
  }

 private:
  void block(int head, int query, const float* logs) {
    int w = a_.width, count = std::min(QUERIES, n_ - query), row = start_ + query;
    Seen seen(query, count, a_.window);
    const bf16 *q = a_.q(row, head, w), *g = d_.to_out(row, head, w);
    block_rows(q, a_.q.stride, count, w, steps_, q_);
    block_rows(g, d_.to_out.stride, count, w, steps_, g_);
    for (int t = 0; t < steps_ * 2; t++) {
      int left = std::max(0, w - t * TILE_ROWS);
      tile_of_pairs(q + t * TILE_ROWS, a_.q.stride, count, left, q_pairs_ + t * TILE);
      tile_of_pairs(g + t * TILE_ROWS, d_.to_out.stride, count, left, g_pairs_ + t * TILE);
    }
    block_scores(q_, columns_, steps_, seen, scores_);
    block_scores(g_, values_, steps_, seen, slopes_);
    for (int r = 0; r < QUERIES; r++) slope(r, r < count, head, query, seen, logs);
    accumulate(scores_, seen, g_pairs_, to_v_);
    accumulate(slopes_, seen, q_pairs_, to_k_);
    as_left(slopes_, seen, left_);
    for (int column = 0; column < w; column += 32) {
      const bf16* b = inputs_ + (size_t(column / TILE_ROWS) * all_ + seen.first / TILE_INPUTS) * TILE;
      multiply<2, 2>(left_, size_t(seen.steps) * TILE, b, size_t(all_) * TILE, seen.steps, c_, 32, false);
      put_rows(c_, 32, count, std::min(32, w - column), d_.to_q(row, head, w) + column, d_.to_q.stride, false);
    }
  }

  // Row r of the weights, and of the derivative by the scores: weight * (its gradient - sum of weight * gradient).
  void slope(int r, bool real, int head, int query, const Seen& seen, const float* logs) {
    float *weights = scores_ + size_t(r) * seen.keys(), *slopes = slopes_ + size_t(r) * seen.keys();
    if (!real) {
      std::memset(weights, 0, seen.keys() * sizeof(float));
      std::memset(slopes, 0, seen.keys() * sizeof(float));
      return;
    }
    int row = start_ + query + r;
    const bf16 *out = d_.out(row, head, a_.width), *g = d_.to_out(row, head, a_.width);
    vf along = {};
    for (int i = 0; i < a_.width; i += 16) along += part(out + i, a_.width - i) * part(g + i, a_.width - i);
    float mean = sum(along), shift = logs[query + r];
    weights_of(weights, seen, query + r, a_, true, shift);
    for (int i = 0; i < seen.keys(); i += 16)
      store(slopes + i, load(weights + i) * (load(slopes + i) - mean) * a_.scale);
  }

  // sums [keys][width] += values^T [keys][32 queries] * the block's rows as pairs.
  void accumulate(const float* values, const Seen& seen, const bf16* pairs, float* sums) {
    for (int key = 0; key < seen.keys(); key += 32) {
      for (int g = 0; g < 2; g++)
        tile_of_turned(values + key + g * TILE_ROWS, seen.keys(), TILE_ROWS, QUERIES, turned_ + g * TILE);
      for (int column = 0; column < wide_; column += 32)
        multiply<2, 2>(turned_, TILE, pairs + column / TILE_ROWS * TILE, TILE, 1,
                       sums + size_t(seen.first + key) * wide_ + column, wide_, true);
    }
  }

  const Attending& a_;
  const Derivative& d_;
  int start_, n_, kv_, steps_, all_, wide_;
  bf16 *columns_, *values_, *inputs_, *q_, *g_, *q_pairs_, *g_pairs_, *left_, *turned_;
  float *to_k_, *to_v_, *scores_, *slopes_, *c_;
};

}  // namespace loraplex
#endif
