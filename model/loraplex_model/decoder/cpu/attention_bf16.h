// Causal attention in products of bfloat16, for decode rows and prompt chunks alike.
//
// A unit of work is one key/value head and up to 32 rows: the queries of one sequence in this pass times the
// query heads that share the head. Positions are taken in spans of 256 that begin at multiples of 256. For a
// span, a row's scores are computed and its maximum updated; its sums are scaled if the maximum has grown;
// then its weights, rounded to bfloat16, times the values are added to them. Products run over positions in
// steps of 32 at multiples of 32. So a query's bits depend on its own context alone, and neither on its chunk
// nor on the other rows of the unit, for which only zeros are added.
//
// A row never multiplies what lies outside of its context. These positions may hold NaN, because another
// sequence wrote them, or because a later query of the same sequence is NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "activations.h"
#include "attention.h"
#include "paired.h"
#include "rows.h"
#include "tiles.h"

namespace loraplex {

#if LORAPLEX_ORDER

constexpr int SPAN = 256;        // positions whose scores are kept at once
constexpr int QUERY_ROWS = 2 * TILE_ROWS;
constexpr float BELOW_ALL = -3e38f;  // the maximum of no scores

// 2^x for x <= 0, within 3e-6 of itself, and 1 for 0; 0 below -126. NaN stays NaN.
inline vf power2(vf x) {
  vf rounded = x + 12582912.0f, r = x - (rounded - 12582912.0f);
  vf p = r * 9.582853095e-03f + 5.590642460e-02f;
  p = p * r + 2.402409861e-01f;
  p = p * r + 6.931241934e-01f;
  p = p * r + 1.0f;
  vf scaled = p * bit_cast<vf>((bit_cast<vu>(rounded) << 23) + 0x3f800000u);
  return x < -126.0f ? vf{} : scaled;
}

// Two vectors, one after the other, rounded to bfloat16, as pairs of neighbours.
inline vu rounded_pairs(vf a, vf b) {
#if defined(LORAPLEX_AMX) || defined(LORAPLEX_VDPBF16PS)
  return (vu)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
  bf16 both[2 * LANES];
  store(both, a);
  store(both + LANES, b);
  return load_pairs(both);
#endif
}

inline vi lane_numbers() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Rows [first, first + count) of a run of queries. Row i is head i % group of query i / group.
struct QueryRows {
  const float* q;            // the group's first head in the run's first query
  size_t stride;             // from a query to the next
  const int32_t* positions;  // of the run's queries
  int group, first, count;
};

// Attention of R tiles of rows.
template <int R>
class TileAttention {
 public:
  static size_t scratch_size(int head_dim, int block_size) {  // in floats
    size_t steps = key_steps(head_dim), tiles = column_tiles(head_dim);
    return 16 + R * (SPAN * 16 + SPAN * 8 + steps * TILE / 2 + tiles * 256) + R * N * 256 + 2 * N * TILE / 2 +
           KEY_TILES * steps * 8 * key_stride(block_size);
  }

  TileAttention(const QueryRows& rows, const PairedPages& pages, int head, int window, Scoring scoring, float* scratch)
      : rows_(rows), pages_(pages), head_(head), scoring_(scoring), count_(rows.count),
        steps_(key_steps(pages.head_dim)), tiles_(column_tiles(pages.head_dim)),
        stride_(key_stride(pages.block_size)) {
    scratch += -(reinterpret_cast<uintptr_t>(scratch) / 4) % 16;  // to the next cache line
    auto take = [&](size_t floats) { return std::exchange(scratch, scratch + floats); };
    scores_ = take(R * SPAN * 16);
    weights_ = reinterpret_cast<bf16*>(take(R * SPAN * 8));
    q_ = reinterpret_cast<bf16*>(take(R * steps_ * TILE / 2));
    sums_ = take(R * tiles_ * 256);
    spare_ = take(R * N * 256);
    value_copies_ = reinterpret_cast<bf16*>(take(2 * N * TILE / 2));
    key_copies_ = reinterpret_cast<bf16*>(scratch);
    some_ = {INT32_MAX, 0};
    every_ = {0, INT32_MAX};
    for (int r = 0; r < count_; r++) {
      int end = rows.positions[(rows.first + r) / rows.group] + 1, first = window ? std::max(0, end - window) : 0;
      context_[r] = {first, end};
      some_ = {std::min(some_.first, first), std::max(some_.end, end)};
      every_ = {std::max(every_.first, first), std::min(every_.end, end)};
    }
  }

  // Writes the head_dim outputs of every row r to out(r).
  template <class Out>
  void run(Out out) {
    begin();
    for (span_ = some_.first / SPAN * SPAN; span_ < some_.end; span_ += SPAN) {
      begin_ = std::max(span_, some_.first / TILE_INPUTS * TILE_INPUTS);
      end_ = std::min(span_ + SPAN, some_.end);
      score();
      find_tops();
      for (int r = 0; r < count_; r++) soften(r);
      for (int column = 0; column < tiles_; column += N) weigh(column, std::min(N, tiles_ - column));
    }
    for (int r = 0; r < count_; r++) write(r, out(r));
  }

 private:
  struct Range {
    int first, end;
  };
  static constexpr int N = 4 / R;          // tiles of columns whose sums fit in the registers
  static constexpr int KEY_TILES = 4 / R;  // the same for positions

  static int key_steps(int width) { return (width + TILE_INPUTS - 1) / TILE_INPUTS; }
  static int column_tiles(int head_dim) { return (head_dim + 15) / 16; }
  static int key_stride(int block_size) { return block_size % 16 ? 32 : 2 * block_size; }

  // The 16 scores of row r from position j on; those of the next 16 positions are R * 256 further.
  float* score(int j, int r) const { return scores_ + (unsigned(j - span_) / 16 * R + r / 16) * 256 + r % 16 * 16; }
  // The 32 weights of row r from position j on.
  bf16* weight(int j, int r) const {
    return weights_ + (unsigned(j - span_) / TILE_INPUTS * R + r / 16) * TILE + r % 16 * TILE_INPUTS;
  }
  float* sum(int n, int r) const { return sums_ + (n * R + r / 16) * 256 + r % 16 * 16; }

  void begin() {
    std::memset(sums_, 0, R * tiles_ * 256 * sizeof(float));
    int d = pages_.head_dim;
    if (d % TILE_INPUTS) std::memset(q_, 0, R * steps_ * TILE * sizeof(bf16));
    for (int r = 0; r < count_; r++) {
      int i = rows_.first + r;
      const float* q = rows_.q + i / rows_.group * rows_.stride + i % rows_.group * d;
      for (int s = 0; s < steps_; s++)
        put(q + s * TILE_INPUTS, std::min(TILE_INPUTS, d - s * TILE_INPUTS), q_ + (s * R + r / 16) * TILE + r % 16 * TILE_INPUTS);
      tops_[r] = BELOW_ALL;
      totals_[r] = 0;
    }
  }

  // Scores of positions [begin_, end_), in whole tiles of positions.
  void score() {
    for (int j = begin_; j < end_;) {
      auto key = [&](int s, int n) { return key_tile(j + n * 16, s, n); };
      float* out = score(j, 0);
      int tiles = (end_ - j + 15) / 16;
      if (tiles >= KEY_TILES) {
        chain<R, KEY_TILES, true>(count_, q_, steps_, key, stride_, out);
        j += 16 * KEY_TILES;
      } else {
        chain<R, 1, true>(count_, q_, steps_, key, stride_, out);
        j += 16;
      }
    }
  }

  // Dimensions [32 s, 32 s + 32) of the keys at the 16 positions from j on: in the cache, or a copy in place n
  // where blocks are smaller or dimensions have to be filled up with zeros.
  const bf16* key_tile(int j, int s, int n) {
    int block_size = pages_.block_size, pairs = std::min(16, pages_.pairs() - s * 16);
    bool whole = block_size % 16 == 0;
    const bf16* at = pages_.key(j, head_) + size_t(s) * 16 * 2 * block_size;
    if (whole && pairs == 16) return at;
    bf16* copy = key_copies_ + size_t(n * steps_ + s) * 16 * stride_;
    for (int p = 0; p < 16; p++) std::memset(copy + p * stride_, 0, 32 * sizeof(bf16));
    for (int i = 0; i < 16 && (whole || j + i < end_); i++) {
      if (!whole) at = pages_.key(j + i, head_) + size_t(s) * 16 * 2 * block_size;
      for (int p = 0; p < pairs; p++)
        std::memcpy(copy + p * stride_ + 2 * i, at + (whole ? 2 * i : 0) + size_t(p) * 2 * block_size, 2 * sizeof(bf16));
    }
    return copy;
  }

  // The steps of the span in which row r sees a position.
  Range seen_steps(int r) const {
    Range seen = {std::max(context_[r].first, begin_), std::min(context_[r].end, end_)};
    if (seen.first >= seen.end) return {end_, end_};
    return {seen.first / TILE_INPUTS * TILE_INPUTS, seen.end};
  }

  // Updates the rows' maxima and scales their sums; scores outside of a row's context become -infinity.
  void find_tops() {
    constexpr float LOG2E = 1.44269504f;
    exponent_scale_ = (scoring_.softcap ? 1.0f : scoring_.scale) * LOG2E;
    alignas(64) float growth[QUERY_ROWS] = {};
    bool grown = false;
    for (int r = 0; r < count_; r++) {
      float top = std::max(tops_[r], highest(r));
      growth[r] = (tops_[r] - top) * exponent_scale_;
      grown |= top != tops_[r];
      tops_[r] = top;
    }
    if (!grown) return;
    for (int r = 0; r < QUERY_ROWS; r += LANES) store(growth + r, power2(load(growth + r)));
    for (int r = 0; r < count_; r++) {
      totals_[r] *= growth[r];
      for (int n = 0; n < tiles_; n++) store(sum(n, r), load(sum(n, r)) * growth[r]);
    }
  }

  float highest(int r) {
    Range seen = seen_steps(r), context = context_[r];
    vf top = set1(BELOW_ALL), other = top;
    for (int j = seen.first; j < seen.end; j += TILE_INPUTS) {
      float* s = score(j, r);
      vf low = load(s), high = load(s + R * 256);
      bool inside = j >= context.first && j + TILE_INPUTS <= context.end;
      if (scoring_.softcap || !inside) {
        if (scoring_.softcap) low = capped(low), high = capped(high);
        if (!inside) low = seen_only(low, j, context), high = seen_only(high, j + 16, context);
        store(s, low);
        store(s + R * 256, high);
      }
      top = max(low, top);  // NaN does not become a maximum
      other = max(high, other);
    }
    top = max(top, other);
    top = max(top, __builtin_shuffle(top, lane_numbers() ^ 8));
    top = max(top, __builtin_shuffle(top, lane_numbers() ^ 4));
    top = max(top, __builtin_shuffle(top, lane_numbers() ^ 2));
    top = max(top, __builtin_shuffle(top, lane_numbers() ^ 1));
    return top[0];
  }

  vf capped(vf s) const { return tanh(s * scoring_.scale / scoring_.softcap) * scoring_.softcap; }

  static vf seen_only(vf s, int j, Range context) {
    vi position = lane_numbers() + j;
    return ((position >= context.first) & (position < context.end)) ? s : set1(-INFINITY);
  }

  // Turns a row's scores into weights, zeros outside of its context. Their sum is that of the rounded weights,
  // so that rounding does not change the sum of what the values are multiplied with.
  void soften(int r) {
    Range seen = seen_steps(r);
    vf evens = {}, odds = {};
    vf top = set1(tops_[r]);
    for (int j = begin_; j < seen.first; j += TILE_INPUTS) std::memset(weight(j, r), 0, TILE_INPUTS * sizeof(bf16));
    int j = seen.first;
    for (; j < seen.end; j += TILE_INPUTS) {
      const float* s = score(j, r);
      vf low = power2((load(s) - top) * exponent_scale_), high = power2((load(s + R * 256) - top) * exponent_scale_);
      vu pairs = rounded_pairs(low, high);
      std::memcpy(weight(j, r), &pairs, sizeof pairs);
      evens += even(pairs);
      odds += odd(pairs);
    }
    for (; j < end_; j += TILE_INPUTS) std::memset(weight(j, r), 0, TILE_INPUTS * sizeof(bf16));
    totals_[r] += loraplex::sum(evens + odds);
  }

  void weigh(int column, int tiles) {
    if constexpr (N >= 4) {
      if (tiles == 4) return weigh<4>(column);
      if (tiles == 3) return weigh<3>(column);
    }
    tiles == 2 ? weigh<2>(column) : weigh<1>(column);
  }

  void write(int r, float* out) const {
    float inverse = 1.0f / totals_[r];
    for (int n = 0, left = pages_.head_dim; n < tiles_; n++, left -= 16, out += 16) {
      vf x = load(sum(n, r)) * inverse;
      std::memcpy(out, &x, std::min(left, 16) * sizeof(float));
    }
  }

  // Adds weights times values to the sums of C tiles of columns. Steps that every row sees are one chain.
  template <int C>
  void weigh(int column) {
    float* sums = sum(column, 0);
    for (int j = begin_; j < end_;) {
      int steps = (std::min(end_, every_.end) - j) / TILE_INPUTS;
      if (j >= every_.first && steps > 0) {
        weigh_whole<C>(j, steps, column, sums);
        j += steps * TILE_INPUTS;
      } else {
        weigh_edge<C>(j, column, sums);
        j += TILE_INPUTS;
      }
    }
  }

  template <int C>
  void weigh_whole(int first, int steps, int column, float* sums) {
    if (pages_.block_size % TILE_INPUTS == 0 && pages_.head_dim % 16 == 0) {
      auto value = [&](int s, int n) { return pages_.value(first + s * TILE_INPUTS, head_) + (column + n) * 32; };
      return chain<R, C, false>(count_, weight(first, 0), steps, value, 2 * pages_.head_dim, sums);
    }
    copy_values<C>(first, column, copied(0));
    auto value = [&](int s, int n) {
      if (n == 0 && s + 1 < steps) copy_values<C>(first + (s + 1) * TILE_INPUTS, column, copied(s + 1));
      return copied(s) + n * 32;
    };
    chain<R, C, false>(count_, weight(first, 0), steps, value, C * 32, sums);
  }

  bf16* copied(int s) const { return value_copies_ + (s & 1) * N * TILE; }

  // Copies the values at the 32 positions from j on: [16 pairs][C][16 columns][2].
  template <int C>
  void copy_values(int j, int column, bf16* out) const {
    int width = std::min(C * 16, pages_.head_dim - column * 16);
    for (int p = 0; p < TILE_INPUTS; p += 2, out += C * 32) {
      const bf16* at = pages_.value(j + p, head_) + column * 32;
      if (width == C * 16) {
        std::memcpy(out, at, C * 32 * sizeof(bf16));
      } else {
        std::memset(out, 0, C * 32 * sizeof(bf16));
        std::memcpy(out, at, 2 * width * sizeof(bf16));
      }
    }
  }

  // One step that not every row sees whole.
  template <int C>
  void weigh_edge(int j, int column, float* sums) {
    auto value = [&](int, int n) { return copied(0) + n * 32; };
    if (copy_range(j, column, C, some_)) return chain<R, C, false>(count_, weight(j, 0), 1, value, C * 32, sums);
    for (int r = 0; r < count_; r++) {
      copy_range(j, column, C, context_[r]);
      std::memcpy(spare_, sums, R * C * 256 * sizeof(float));
      chain<R, C, false>(count_, weight(j, 0), 1, value, C * 32, spare_);
      for (int n = 0; n < C; n++) std::memcpy(sum(column + n, r), spare_ + (sum(n, r) - sums_), 16 * sizeof(float));
    }
  }

  // Copies values as `copy_values` does, with zeros outside of `range`. Returns whether all are finite.
  bool copy_range(int j, int column, int tiles, Range range) const {
    int width = std::min(tiles * 16, pages_.head_dim - column * 16);
    bf16* out = copied(0);
    auto seen = [&](int position) { return position >= range.first && position < range.end; };
    vi special = {};
    for (int p = 0; p < TILE_INPUTS; p += 2, out += tiles * 32) {
      uint32_t mask = (seen(j + p) ? 0xffffu : 0) | (seen(j + p + 1) ? 0xffff0000u : 0);
      std::memset(out, 0, tiles * 32 * sizeof(bf16));
      if (!mask) continue;
      std::memcpy(out, pages_.value(j + p, head_) + column * 32, 2 * width * sizeof(bf16));
      for (int n = 0; n < tiles; n++) {
        vu kept = load_pairs(out + n * 32) & mask;
        std::memcpy(out + n * 32, &kept, sizeof kept);
        special |= ((kept & 0x7f80u) == 0x7f80u) | ((kept & 0x7f800000u) == 0x7f800000u);
      }
    }
    for (int i = 0; i < LANES; i++)
      if (special[i]) return false;
    return true;
  }

  QueryRows rows_;
  PairedPages pages_;
  int head_;
  Scoring scoring_;
  int count_, steps_, tiles_, stride_;
  float exponent_scale_ = 0;
  int span_ = 0, begin_ = 0, end_ = 0;  // the current span, and the positions of it that some row sees
  Range some_, every_;                  // what some row sees, and what every row sees
  Range context_[QUERY_ROWS];
  float tops_[QUERY_ROWS], totals_[QUERY_ROWS];
  float *scores_, *sums_, *spare_;
  bf16 *weights_, *q_, *key_copies_, *value_copies_;
};

// Floats of the scratch of a unit.
inline size_t attention_scratch(int head_dim, int block_size) {
  return std::max(TileAttention<1>::scratch_size(head_dim, block_size),
                  TileAttention<2>::scratch_size(head_dim, block_size));
}

// Attention of up to 32 rows; the head_dim outputs of row r are written to out(r). A row sees positions
// (position - window, position], or all up to its own if window is 0.
template <class Out>
inline void attend_rows(const QueryRows& rows, const PairedPages& pages, int head, int window, Scoring scoring,
                        float* scratch, Out out) {
  if (rows.count <= TILE_ROWS)
    TileAttention<1>(rows, pages, head, window, scoring, scratch).run(out);
  else
    TileAttention<2>(rows, pages, head, window, scoring, scratch).run(out);
}

#endif

}  // namespace loraplex
