// Causal attention in products of bfloat16, for decode rows and prompt chunks alike.
//
// A unit of work is one key/value head and some rows: the queries of one sequence in this pass times the query
// heads that share the head. Positions are taken in spans of 256 that begin at multiples of 256. For a span, the
// scores of a group of rows are computed and their maxima updated; sums are scaled if a maximum has grown; then
// weights, rounded to bfloat16, times the values are added to them. Products run over positions in steps of 32 at
// multiples of 32. So a query's bits depend on its own context alone, and neither on its chunk nor on the other
// rows of the unit, for which only zeros are added.
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
constexpr int QUERY_ROWS = 6 * TILE_ROWS;
constexpr float BELOW_ALL = -3e38f;  // the maximum of no scores

inline vi lane_numbers() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Attention of rows in groups of R tiles.
template <int R>
class TileAttention {
 public:
  static size_t scratch_size(int head_dim, int block_size) {  // in floats
    size_t steps = key_steps(head_dim), tiles = column_tiles(head_dim), groups = QUERY_ROWS / GROUP;
    return 16 + GROUP * SPAN + GROUP * SPAN / 2 + groups * R * (steps * TILE / 2 + tiles * 256) + R * N * 256 +
           N * TILE / 2 + (SPAN / TILE_INPUTS + 2) * tiles * TILE / 2 + KEY_TILES * steps * 8 * key_stride(block_size);
  }

  TileAttention(const QueryRows& rows, const PairedPages& pages, int head, int window, Scoring scoring, float* scratch)
      : rows_(rows), pages_(pages), head_(head), scoring_(scoring), count_(rows.count),
        steps_(key_steps(pages.head_dim)), tiles_(column_tiles(pages.head_dim)),
        stride_(key_stride(pages.block_size)) {
    int groups = (count_ + GROUP - 1) / GROUP;
    scratch += -(reinterpret_cast<uintptr_t>(scratch) / 4) % 16;  // to the next cache line
    auto take = [&](size_t floats) { return std::exchange(scratch, scratch + floats); };
    scores_ = take(GROUP * SPAN);
    weights_ = reinterpret_cast<bf16*>(take(GROUP * SPAN / 2));
    q_ = reinterpret_cast<bf16*>(take(groups * R * steps_ * TILE / 2));
    sums_ = take(groups * R * tiles_ * 256);
    spare_ = take(R * N * 256);
    spare_values_ = reinterpret_cast<bf16*>(take(N * TILE / 2));
    values_ = reinterpret_cast<bf16*>(take((SPAN / TILE_INPUTS + 2) * tiles_ * TILE / 2));
    key_copies_ = reinterpret_cast<bf16*>(scratch);
    exponent_scale_ = (scoring.softcap ? 1.0f : scoring.scale) * 1.44269504f;
    lowest_ = -120.0f / exponent_scale_;
    some_ = {INT32_MAX, 0};
    every_ = {0, INT32_MAX};
    begin(window);
  }

  // Writes the head_dim outputs of every row r to out(r).
  template <class Out>
  void run(Out out) {
    for (span_ = some_.first / SPAN * SPAN; span_ < some_.end; span_ += SPAN) {
      begin_ = std::max(span_, some_.first / TILE_INPUTS * TILE_INPUTS), end_ = std::min(span_ + SPAN, some_.end);
      copy_others();
      for (group_ = 0; group_ < count_; group_ += GROUP) {
        in_group_ = std::min(GROUP, count_ - group_);
        score();
        find_tops();
        for (int r = 0; r < in_group_; r++) soften(r);
        for (int column = 0; column < tiles_; column += N) weigh(column, std::min(N, tiles_ - column));
      }
    }
    for (int r = 0; r < count_; r++) write(r, out(r));
  }

 private:
  struct Range {
    int first, end;
  };
  static constexpr int GROUP = R * TILE_ROWS;
  static constexpr int N = 4 / R;          // tiles of columns whose sums fit in the registers
  static constexpr int KEY_TILES = 4 / R;  // the same for positions

  static int key_steps(int width) { return (width + TILE_INPUTS - 1) / TILE_INPUTS; }
  static int column_tiles(int head_dim) { return (head_dim + 15) / 16; }
  static int key_stride(int block_size) { return block_size % 16 ? 32 : 2 * block_size; }

  // The 16 scores of the group's row r from position j on; those of the next 16 positions are R * 256 further.
  float* score(int j, int r) const { return scores_ + (unsigned(j - span_) / 16 * R + r / 16) * 256 + r % 16 * 16; }
  // The 32 weights of the group's row r from position j on; those of the next 32 are R * TILE further.
  bf16* weight(int j, int r) const {
    return weights_ + (unsigned(j - span_) / TILE_INPUTS * R + r / 16) * TILE + r % 16 * TILE_INPUTS;
  }
  // 16 outputs of the unit's row r, not divided by its total yet; the next 16 are R * 256 further.
  float* sum(int n, int r) const {
    return sums_ + ((r / GROUP * tiles_ + n) * R + r % GROUP / 16) * 256 + r % 16 * 16;
  }
  // Parts of the sum of a row's weights.
  float* total(int r) { return totals_ + r * LANES; }

  void begin(int window) {
    int d = pages_.head_dim, groups = (count_ + GROUP - 1) / GROUP;
    int query = rows_.first / rows_.group, own = rows_.first % rows_.group;
    std::memset(sums_, 0, groups * R * tiles_ * 256 * sizeof(float));
    std::memset(totals_, 0, count_ * LANES * sizeof(float));
    std::fill_n(tops_, groups * GROUP, BELOW_ALL);
    if (d % TILE_INPUTS) std::memset(q_, 0, groups * R * steps_ * TILE * sizeof(bf16));
    for (int r = 0; r < count_; r++) {
      const float* q = rows_.q + query * rows_.stride + own * d;
      bf16* to = q_ + r / GROUP * steps_ * R * TILE + r % GROUP * TILE_INPUTS;
      for (int left = d; left > 0; left -= TILE_INPUTS, q += TILE_INPUTS, to += R * TILE)
        put(q, std::min(TILE_INPUTS, left), to);
      int end = rows_.positions[query] + 1, first = window ? std::max(0, end - window) : 0;
      context_[r] = {first, end};
      some_ = {std::min(some_.first, first), std::max(some_.end, end)};
      every_ = {std::max(every_.first, first), std::min(every_.end, end)};
      if (++own == rows_.group) own = 0, query++;
    }
  }

  // Scores of positions [begin_, end_), in whole tiles of positions.
  void score() {
    const bf16* q = q_ + group_ * steps_ * TILE_INPUTS;
    const bf16* at[KEY_TILES];
    const bool direct = pages_.block_size % 16 == 0 && pages_.head_dim % TILE_INPUTS == 0;
    for (int j = begin_; j < end_;) {
      auto key = [&](int s, int n) { return direct ? at[n] + s * 16 * stride_ : copied_key(j + n * 16, s, n); };
      float* out = score(j, 0);
      int tiles = (end_ - j + 15) / 16 >= KEY_TILES ? KEY_TILES : 1;
      for (int n = 0; n < tiles; n++) at[n] = pages_.key(j + n * 16, head_);
      tiles == 1 ? chain<R, 1, true>(in_group_, q, steps_, key, stride_, out)
                 : chain<R, KEY_TILES, true>(in_group_, q, steps_, key, stride_, out);
      j += tiles * 16;
    }
  }

  // A copy, in place n, of dimensions [32 s, 32 s + 32) of the keys at the 16 positions from j on, for blocks that
  // are smaller or dimensions that have to be filled up with zeros.
  const bf16* copied_key(int j, int s, int n) {
    int block_size = pages_.block_size, pairs = std::min(16, pages_.pairs() - s * 16);
    bool whole = block_size % 16 == 0;
    const bf16* at = pages_.key(j, head_) + size_t(s) * 16 * 2 * block_size;
    if (whole && pairs == 16) return at;
    bf16* copy = key_copies_ + size_t(n * steps_ + s) * 16 * stride_;
    for (int p = 0; p < 16; p++) std::memset(copy + p * stride_, 0, 32 * sizeof(bf16));
    for (int i = 0; i < 16 && (whole || j + i < end_); i++) {
      if (!whole) at = pages_.key(j + i, head_) + size_t(s) * 16 * 2 * block_size;
      for (int p = 0; p < pairs; p++)
        std::memcpy(copy + p * stride_ + 2 * i, at + (whole ? 2 * i : 0) + size_t(p) * 2 * block_size, sizeof(bf16[2]));
    }
    return copy;
  }

  // The steps of the span in which the group's row r sees a position.
  Range seen_steps(int r) const {
    Range context = context_[group_ + r], seen = {std::max(context.first, begin_), std::min(context.end, end_)};
    if (seen.first >= seen.end) return {end_, end_};
    return {seen.first / TILE_INPUTS * TILE_INPUTS, seen.end};
  }

  // Updates the rows' maxima and scales their sums; scores outside of a row's context become -infinity.
  void find_tops() {
    bool grown = false;
    alignas(64) float growth[GROUP];
    for (int t = 0; t < R; t++) {
      vf highest[TILE_ROWS];
      for (int r = 0; r < TILE_ROWS; r++)
        highest[r] = t * TILE_ROWS + r < in_group_ ? this->highest(t * TILE_ROWS + r) : set1(BELOW_ALL);
      float* tops = tops_ + group_ + t * TILE_ROWS;
      vf old = load(tops), top = max(greatest_lanes(highest), old);
      store(tops, top);
      store(growth + t * TILE_ROWS, power2(old - top, exponent_scale_, lowest_));
      grown |= std::memcmp(&old, &top, sizeof top) != 0;
    }
    if (!grown || span_ <= some_.first) return;
    for (int r = 0; r < in_group_; r++) {
      float *total = this->total(group_ + r), *sums = sum(0, group_ + r);
      store(total, load(total) * growth[r]);
      for (int n = 0; n < tiles_; n++, sums += R * 256) store(sums, load(sums) * growth[r]);
    }
  }

  // The highest scores of the group's row r, lane by lane.
  vf highest(int r) {
    Range seen = seen_steps(r), context = context_[group_ + r];
    vf top = set1(BELOW_ALL), other = top;
    float* s = score(seen.first, r);
    for (int j = seen.first; j < seen.end; j += TILE_INPUTS, s += 2 * R * 256) {
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
    return max(top, other);
  }

  vf capped(vf s) const { return tanh(s * scoring_.scale / scoring_.softcap) * scoring_.softcap; }

  static vf seen_only(vf s, int j, Range context) {
    vi position = lane_numbers() + j;
    return ((position >= context.first) & (position < context.end)) ? s : set1(-INFINITY);
  }

  // Turns a row's scores into weights, zeros outside of its context. Their sum is that of the rounded weights,
  // so that rounding does not change the sum of what the values are multiplied with.
  void soften(int r) {
    Range seen = seen_steps(r), context = context_[group_ + r];
    vf evens = {}, odds = {};
    const vf top = set1(tops_[group_ + r]);
    const float scale = exponent_scale_, lowest = lowest_;
    const float* s = score(seen.first, r);
    bf16* w = weight(begin_, r);
    int j = begin_;
    for (; j < seen.first; j += TILE_INPUTS, w += R * TILE) std::memset(w, 0, TILE_INPUTS * sizeof(bf16));
    for (; j < seen.end; j += TILE_INPUTS, s += 2 * R * 256, w += R * TILE) {
      vf low = load(s), high = load(s + R * 256);
      vf a = power2(low - top, scale, lowest), b = power2(high - top, scale, lowest);
      if (j < context.first || j + TILE_INPUTS > context.end)
        a = low == -INFINITY ? vf{} : a, b = high == -INFINITY ? vf{} : b;
      vu pairs = rounded_pairs(a, b);
      std::memcpy(w, &pairs, sizeof pairs);
      evens += even(pairs);
      odds += odd(pairs);
    }
    for (; j < end_; j += TILE_INPUTS, w += R * TILE) std::memset(w, 0, TILE_INPUTS * sizeof(bf16));
    float* total = this->total(group_ + r);
    store(total, load(total) + (evens + odds));
  }

  // Adds weights times values to the sums of C tiles of columns.
  template <int C>
  void weigh(int column) {
    float* sums = sum(column, group_);
    for (int j = begin_; j < end_;) {
      int steps = 0;
      while (j + steps * TILE_INPUTS < end_ && !special_[step(j) + steps]) steps++;
      auto prepare = [&](int s) {
        if (!group_ && !column && s < steps && is_whole(j + s * TILE_INPUTS)) copy_whole(j + s * TILE_INPUTS);
      };
      prepare(0);
      auto value = [&](int s, int n) {
        if (!n) prepare(s + 1);
        return copied(j + s * TILE_INPUTS) + (column + n) * 32;
      };
      if (steps) chain<R, C, false>(in_group_, weight(j, 0), steps, value, 32 * tiles_, sums);
      j += steps * TILE_INPUTS;
      if (j >= end_) break;
      weigh_special<C>(j, column, sums);
      j += TILE_INPUTS;
    }
  }

  // A step in which not every row sees all values, and some of them are not finite: each row with values of its own.
  template <int C>
  void weigh_special(int j, int column, float* sums) {
    auto value = [&](int, int n) { return spare_values_ + n * 32; };
    for (int r = 0; r < in_group_; r++) {
      copy_seen(j, column, C, context_[group_ + r], spare_values_);
      std::memcpy(spare_, sums, R * C * 256 * sizeof(float));
      chain<R, C, false>(in_group_, weight(j, 0), 1, value, 32 * C, spare_);
      for (int n = 0; n < C; n++) {
        float* to = sum(column + n, group_ + r);
        std::memcpy(to, spare_ + (to - sums), 16 * sizeof(float));
      }
    }
  }

  int step(int j) const { return unsigned(j - span_) / TILE_INPUTS; }
  // Whether every row sees all of the 32 positions from j on. Then their values are copied as they are, when the
  // first group reads them; the others beforehand.
  bool is_whole(int j) const {
    return j >= every_.first && j + TILE_INPUTS <= every_.end && pages_.head_dim % 16 == 0;
  }

  // Where the values of 32 positions are copied to. Those that are read once take turns in two places, so that they
  // stay in the cache.
  bf16* copied(int j) const {
    bool once = count_ <= GROUP && tiles_ <= N && is_whole(j);
    return values_ + size_t(once ? SPAN / TILE_INPUTS + step(j) % 2 : step(j)) * tiles_ * TILE;
  }

  void copy_whole(int j) const {
    bf16* out = copied(j);
    for (int end = j + TILE_INPUTS; j < end;) {
      int count = std::min(end - j, pages_.block_size - j % pages_.block_size);
      const bf16* at = pages_.value(j, head_);
#pragma GCC unroll 4
      for (int i = 0; i < count * pages_.head_dim; i += 32) {
        vu pairs = load_pairs(at + i);
        std::memcpy(out + i, &pairs, sizeof pairs);
      }
      j += count, out += count * pages_.head_dim;
    }
  }

  void copy_others() {
    for (int j = begin_; j < end_; j += TILE_INPUTS) {
      special_[step(j)] = false;
      if (is_whole(j) || copy_seen(j, 0, tiles_, some_, copied(j))) continue;
      special_[step(j)] = j < every_.first || j + TILE_INPUTS > every_.end;
    }
  }

  // The same with zeros outside of `range`, [16 pairs][tiles][16][2]. Returns whether all are finite.
  bool copy_seen(int j, int column, int tiles, Range range, bf16* out) const {
    int width = std::min(tiles * 16, pages_.head_dim - column * 16);
    vu special = {};
    std::memset(out, 0, tiles * TILE * sizeof(bf16));
    each_pair(j, range, [&](int p, const bf16* at, uint32_t mask) {
      for (int n = 0; n < tiles; n++) {
        vu pairs = {};
        std::memcpy(&pairs, at + (column + n) * 32, std::min(16, width - n * 16) * 2 * sizeof(bf16));
        pairs &= mask;
        std::memcpy(out + (p * tiles + n) * 32, &pairs, sizeof pairs);
        special |= (vu)((pairs & 0x7f80u) == 0x7f80u) | (vu)((pairs & 0x7f800000u) == 0x7f800000u);
      }
    });
    for (int i = 0; i < LANES; i++)
      if (special[i]) return false;
    return true;
  }

  // Calls use(p, values, mask) for each pair of the 32 positions from j on of which `range` has one; the mask tells
  // which of both.
  template <class Use>
  void each_pair(int j, Range range, Use use) const {
    int first = std::max(j, range.first), end = std::min(j + TILE_INPUTS, range.end);
    for (int p = first & ~1; p < end;) {
      const bf16* at = pages_.value(p, head_);
      int stop = std::min(end, p + pages_.block_size - p % pages_.block_size);
      for (; p < stop; p += 2, at += 2 * pages_.head_dim)
        use((p - j) / 2, at, (p >= first ? 0xffffu : 0) | (p + 1 < end ? 0xffff0000u : 0));
    }
  }

  void weigh(int column, int tiles) {
    if constexpr (N >= 4) {
      if (tiles == 4) return weigh<4>(column);
      if (tiles == 3) return weigh<3>(column);
    }
    tiles == 2 ? weigh<2>(column) : weigh<1>(column);
  }

  void write(int r, float* out) {
    float inverse = 1.0f / loraplex::sum(load(total(r)));
    for (int n = 0, left = pages_.head_dim; n < tiles_; n++, left -= 16, out += 16) {
      vf x = load(sum(n, r)) * inverse;
      std::memcpy(out, &x, std::min(left, 16) * sizeof(float));
    }
  }

  QueryRows rows_;
  PairedPages pages_;
  int head_;
  Scoring scoring_;
  int count_, steps_, tiles_, stride_;
  float exponent_scale_, lowest_;  // the scale of scores as exponents of 2; the lowest one beside the row's maximum
  int span_, begin_, end_;         // the current span, and the positions of it that some row sees
  int group_, in_group_;           // the current group's first row, and how many it has
  Range some_, every_;             // what some row sees, and what every row sees
  Range context_[QUERY_ROWS];
  bool special_[SPAN / TILE_INPUTS];
  alignas(64) float tops_[QUERY_ROWS], totals_[QUERY_ROWS * LANES];
  float *scores_, *sums_, *spare_;
  bf16 *weights_, *q_, *key_copies_, *values_, *spare_values_;
};

// Floats of the scratch of a unit.
inline size_t attention_scratch(int head_dim, int block_size) {
  return std::max(TileAttention<1>::scratch_size(head_dim, block_size),
                  TileAttention<2>::scratch_size(head_dim, block_size));
}

// Attention of up to QUERY_ROWS rows; the head_dim outputs of row r are written to out(r). A row sees positions
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
