// The adapters' part of a projection: y = gain * y + weight * (bias + B (A x)), for rows that have an
// adapter.
//
// Adjacent rows with the same mix form a segment. Shrink (h = A x) and expand (y += B h) read each
// adapter's matrices once per segment. Every element of h is one dot product and every element of y one
// chain of sums over the ranks, whatever the segment, so batching changes the speed and never the bits.
#pragma once

#include "adapters.h"
#include "lora_bf16.h"

namespace loraplex {

constexpr int LORA_ROWS = 48;      // rows of a unit with float
constexpr int SHARED = 3;          // with this many rows or more, weights are widened to float once for all
constexpr int LORA_RANKS = 32;     // ranks of a shrink unit
constexpr int LORA_COLUMNS = 512;  // outputs of an expand unit with float
constexpr int LONG_ROWS = 16;      // segments of so many rows are expanded by the product's units

// An adapter used by a single row comes from memory in runs of a few cache lines, too short for the
// hardware prefetcher to detect. So the kernels prefetch this many columns ahead.
constexpr int COLUMNS_AHEAD = 96;

// A unit of work: rows [first, end) of a segment, for one part (projection) of a fused matrix.
struct LoraUnit {
  int segment, part, first, end;
  int term, rank;       // shrink: the term, and the first of its ranks
  int column, columns;  // expand: the first output, and how many
};

// How the work on rows of type X is divided.
struct LoraUnits {
  int rows, columns;  // of a unit, at most
  bool joins;         // long segments are expanded where the product's unit has just written them

  bool joined(const Segment& segment) const { return joins && segment.end - segment.first >= LONG_ROWS; }
};
template <class X>
constexpr LoraUnits LORA_UNITS =
    TILED<X> ? LoraUnits{240, MOST_COLUMNS, true} : LoraUnits{LORA_ROWS, LORA_COLUMNS, false};

// The projections of one fused matrix and their columns in its output. The head counts as one as well, in
// the layer after the last.
struct Fused {
  int parts;
  int projection[MAX_PARTS];
  int column[MAX_PARTS], width[MAX_PARTS];
};

// The units are the same in every layer. Segments with none of `uses` have no units.
inline std::vector<LoraUnit> shrink_units(const Plan& plan, const SlotTable& table, const Fused& fused,
                                          int uses, LoraUnits sizes) {
  std::vector<LoraUnit> units;
  for (int s = 0; s < int(plan.segments.size()); s++) {
    const Segment& segment = plan.segments[s];
    if (!(segment.uses & uses)) continue;
    for (int t = segment.term_begin; t < segment.term_end; t++)
      for (int part = 0; part < fused.parts; part++)
        for (int rank = 0; rank < table.max_ranks[plan.terms[t].slot]; rank += LORA_RANKS)
          for (int row = segment.first; row < segment.end; row += sizes.rows)
            units.push_back({s, part, row, std::min(row + sizes.rows, segment.end), t, rank, 0, 0});
  }
  return units;
}

inline std::vector<LoraUnit> expand_units(const Plan& plan, const Fused& fused, int uses, LoraUnits sizes) {
  std::vector<LoraUnit> units;
  for (int s = 0; s < int(plan.segments.size()); s++) {
    const Segment& segment = plan.segments[s];
    if (!(segment.uses & uses) || sizes.joined(segment)) continue;
    for (int part = 0; part < fused.parts; part++) {
      int width = fused.width[part], pieces = (width + sizes.columns - 1) / sizes.columns;
      int columns = sizes.joins ? ((width + pieces - 1) / pieces + 31) / 32 * 32 : sizes.columns;
      for (int column = 0; column < width; column += columns)
        for (int row = segment.first; row < segment.end; row += sizes.rows)
          units.push_back({s, part, row, std::min(row + sizes.rows, segment.end), 0, 0, column,
                           std::min(columns, width - column)});
    }
  }
  return units;
}

// 2 * LANES consecutive elements of a row as two vectors. bfloat16 is split into the elements at even and
// at odd places, which takes one load, a shift and a mask; float into the first and the second half.
struct Pair {
  vf first, second;
};
inline Pair load_pair(const float* p) { return {load(p), load(p + LANES)}; }
inline Pair load_pair(const bf16* p) {
  vu both;
  std::memcpy(&both, p, sizeof both);
  return {bit_cast<vf>(both << 16), bit_cast<vf>(both & 0xffff0000u)};
}
constexpr int PAIR = 2 * LANES;

// Reorders a pair of floats to the order of T's pairs (split) and back (join); nothing to do for float.
template <class T>
inline Pair split(Pair p) {
  if constexpr (sizeof(T) == 4) return p;
  return {even_lanes(p.first, p.second), odd_lanes(p.first, p.second)};
}
template <class T>
inline Pair join(Pair p) {
  if constexpr (sizeof(T) == 4) return p;
  return {interleave_low(p.first, p.second), interleave_high(p.first, p.second)};
}

inline void store_pair(float* p, Pair v) {
  store(p, v.first);
  store(p + LANES, v.second);
}

// Copies rows of x in the order of T's pairs; elements after the last whole pair keep their order.
template <class T>
inline void split_rows(const float* x, int rows, int in, float* out) {
  for (int m = 0; m < rows; m++, x += in, out += in) {
    int k = 0;
    for (; k + PAIR <= in; k += PAIR) store_pair(out + k, split<T>(load_pair(x + k)));
    std::copy(x + k, x + in, out + k);
  }
}

// Copies `rows` rows of `columns` weights, `stride` apart, as floats in the order of T's pairs.
template <class T>
inline void widen(const T* weights, int rows, size_t stride, int columns, float* out) {
  for (int r = 0; r < rows; r++, weights += stride, out += columns) {
    int k = 0;
    for (; k + PAIR <= columns; k += PAIR) store_pair(out + k, load_pair(weights + k));
    for (; k < columns; k++) out[k] = load1(weights + k);
  }
}

// h[m][r] = scale * x[m] . a[r], for M rows (in the order of the pairs) and R ranks at once.
template <int M, int R, class W>
inline void dots(const float* x, const W* a, int in, float scale, float* h, int h_stride) {
  vf sums[M][R] = {};
  int k = 0;
  for (; k + PAIR <= in; k += PAIR) {
    if constexpr (M == 1)  // a single row: the weights of the next ranks come from memory as well
      for (int r = k / PAIR % 2; r < R; r += 2) __builtin_prefetch(a + size_t(R + r) * in + k);
    Pair xs[M];
    for (int m = 0; m < M; m++) xs[m] = load_pair(x + size_t(m) * in + k);
    for (int r = 0; r < R; r++) {
      Pair as = load_pair(a + size_t(r) * in + k);
      for (int m = 0; m < M; m++) sums[m][r] = xs[m].first * as.first + sums[m][r];
      for (int m = 0; m < M; m++) sums[m][r] = xs[m].second * as.second + sums[m][r];
    }
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) {
      float total = sum(sums[m][r]);
      for (int i = k; i < in; i++)
        total = multiply_add(x[size_t(m) * in + i], load1(a + size_t(r) * in + i), total);
      h[m * h_stride + r] = total * scale;
    }
}

template <int M, class W>
inline void shrink_rows(const float* x, const W* a, int in, int ranks, float scale, float* h, int h_stride) {
  int r = 0;
  for (; r + 4 <= ranks; r += 4) dots<M, 4>(x, a + size_t(r) * in, in, scale, h + r, h_stride);
  for (; r < ranks; r++) dots<M, 1>(x, a + size_t(r) * in, in, scale, h + r, h_stride);
}

// Number of floats of scratch memory that `shrink` and `expand` need.
inline size_t lora_scratch(int widest_in, int max_rank) {
  return std::max(size_t(LORA_ROWS + LORA_RANKS) * std::max(widest_in, 16), size_t(LORA_COLUMNS) * max_rank);
}

template <class T>
inline void shrink_factor(const float* x, int in, LoraRows rows, const T* a, int rank, int ranks, float weight,
                          float* h, int h_stride, float* scratch, Ahead&) {
  int count = rows.end - rows.first;
  h += size_t(rows.first - rows.origin) * h_stride + rank;
  split_rows<T>(x + size_t(rows.first) * in, count, in, scratch);
  int m = 0;
  if (count >= SHARED) {
    float* wide = scratch + size_t(LORA_ROWS) * in;
    widen(a, ranks, in, in, wide);
    for (; m + 3 <= count; m += 3)
      shrink_rows<3>(scratch + size_t(m) * in, wide, in, ranks, weight, h + m * h_stride, h_stride);
    for (; m < count; m++)
      shrink_rows<1>(scratch + size_t(m) * in, wide, in, ranks, weight, h + m * h_stride, h_stride);
  }
  for (; m < count; m++)
    shrink_rows<1>(scratch + size_t(m) * in, a, in, ranks, weight, h + m * h_stride, h_stride);
}

// The weights of A or B that a unit reads for its segment's first term.
template <class T>
inline Ahead shrink_ahead(const Plan& plan, const SlotTable& table, const Fused& fused, int layer, const LoraUnit& unit,
                          int in) {
  const Entry& entry = table.at(plan.terms[unit.term].slot, layer, fused.projection[unit.part]);
  int ranks = std::min(entry.rank - unit.rank, LORA_RANKS);
  if (ranks <= 0) return {};
  return {static_cast<const T*>(entry.a) + size_t(unit.rank) * in, 1, 0, size_t(ranks) * in * sizeof(T)};
}
template <class T>
inline Ahead expand_ahead(const Plan& plan, const SlotTable& table, const Fused& fused, int layer,
                          const LoraUnit& unit) {
  int slot = plan.terms[plan.segments[unit.segment].term_begin].slot, width = fused.width[unit.part];
  const Entry& entry = table.at(slot, layer, fused.projection[unit.part]);
  if (!entry.rank) return {};
  size_t row = size_t(width) * sizeof(T);
  const T* b = static_cast<const T*>(entry.b) + unit.column;
  if (unit.columns == width) return {b, 1, 0, row * entry.rank};
  return {b, entry.rank, row, unit.columns * sizeof(T)};
}

// `x` are the product's rows, `float*` or `Inputs`. `ahead` is what the thread will probably read next.
template <class T, class Rows>
inline void shrink(const Plan& plan, const SlotTable& table, const Fused& fused, int layer,
                   const LoraUnit& unit, const Rows& x, int in, float* h, float* scratch, Ahead ahead = {}) {
  const Term& term = plan.terms[unit.term];
  const Entry& entry = table.at(term.slot, layer, fused.projection[unit.part]);
  int ranks = std::min(entry.rank - unit.rank, LORA_RANKS);
  if (ranks <= 0) return;
  int width = fused.width[unit.part];
  const T* a = static_cast<const T*>(entry.a) + size_t(unit.rank) * in;
  const T* b = static_cast<const T*>(entry.b) + size_t(unit.rank) * width;
  for (int r = 0; r < ranks; r++)  // the first columns of B, for the expansion
    for (int c = 0; c < COLUMNS_AHEAD; c += 64 / sizeof(T))
      __builtin_prefetch(b + size_t(r) * width + c, 0, 2);
  LoraRows rows{unit.first, unit.end, plan.segments[unit.segment].origin()};
  shrink_factor(x, in, rows, a, unit.rank, ranks, term.weight, h + unit.part * plan.h_size + term.h,
                table.max_ranks[term.slot], scratch, ahead);
}

// y[m][0:C pairs] += sum over r of h[m][r] * b[r], for M rows. The elements of b are in the order of T's
// pairs.
template <class T, int M, int C, class W>
inline void accumulate(const float* h, int h_stride, const W* b, size_t b_stride, int ranks, float* y,
                       size_t y_stride) {
  Pair sums[M][C] = {};
  for (int r = 0; r < ranks; r++) {
    if constexpr (M == 1) __builtin_prefetch(b + r * b_stride + COLUMNS_AHEAD);
    for (int c = 0; c < C; c++) {
      Pair bs = load_pair(b + r * b_stride + c * PAIR);
      for (int m = 0; m < M; m++) {
        sums[m][c].first = h[m * h_stride + r] * bs.first + sums[m][c].first;
        sums[m][c].second = h[m * h_stride + r] * bs.second + sums[m][c].second;
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) {
      float* at = y + m * y_stride + c * PAIR;
      Pair old = load_pair(at), delta = join<T>(sums[m][c]);
      store_pair(at, {old.first + delta.first, old.second + delta.second});
    }
}

template <class T, int M, class W>
inline void expand_rows(const float* h, int h_stride, const W* b, size_t b_stride, int ranks, int columns,
                        float* y, size_t y_stride) {
  int c = 0;
  for (; c + 2 * PAIR <= columns; c += 2 * PAIR)
    accumulate<T, M, 2>(h, h_stride, b + c, b_stride, ranks, y + c, y_stride);
  for (; c + PAIR <= columns; c += PAIR)
    accumulate<T, M, 1>(h, h_stride, b + c, b_stride, ranks, y + c, y_stride);
  for (; c < columns; c++)
    for (int m = 0; m < M; m++) {
      float total = 0;
      for (int r = 0; r < ranks; r++)
        total = multiply_add(h[m * h_stride + r], load1(b + r * b_stride + c), total);
      y[m * y_stride + c] += total;
    }
}

// The same for a single row and up to LORA_COLUMNS columns. B is read in the order in which it lies in memory, two
// rows at once: the processor's prefetching keeps up with few streams only.
template <class T>
inline void expand_row(const float* h, const T* b, size_t b_stride, int ranks, int columns, float* y, Ahead& ahead) {
  int whole = columns / PAIR * PAIR;
  alignas(64) float chains[LORA_COLUMNS];  // in the order of the pairs
  auto add = [&](int r, auto count, auto first) {
    for (int c = 0; c < whole; c += PAIR) {
      ahead.fetch(count);
      Pair sums = first ? Pair{} : load_pair(chains + c);
      for (int i = 0; i < count; i++) {
        Pair bs = load_pair(b + (r + i) * b_stride + c);
        sums.first = h[r + i] * bs.first + sums.first;
        sums.second = h[r + i] * bs.second + sums.second;
      }
      store_pair(chains + c, sums);
    }
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  int r = ranks % 2;
  r ? add(0, One{}, std::true_type{}) : add(0, Two{}, std::true_type{});
  for (r = r ? 1 : 2; r < ranks; r += 2) add(r, Two{}, std::false_type{});
  for (int c = 0; c < whole; c += PAIR) {
    Pair old = load_pair(y + c), delta = join<T>(load_pair(chains + c));
    store_pair(y + c, {old.first + delta.first, old.second + delta.second});
  }
  if (whole < columns)
    expand_rows<T, 1>(h, 0, b + whole, b_stride, ranks, columns - whole, y + whole, 0);
}

// y[m] += B h[m] for the rows of a unit.
template <class T>
inline void expand_factor(const float* h, int h_stride, const T* b, size_t b_stride, int ranks, int rows, int columns,
                          float* y, size_t y_stride, float* scratch, Ahead& ahead) {
  int m = 0;
  if (rows >= SHARED) {
    widen(b, ranks, b_stride, columns, scratch);
    for (; m + 3 <= rows; m += 3)
      expand_rows<T, 3>(h + m * h_stride, h_stride, scratch, columns, ranks, columns, y + m * y_stride, y_stride);
    for (; m < rows; m++)
      expand_rows<T, 1>(h + m * h_stride, h_stride, scratch, columns, ranks, columns, y + m * y_stride, y_stride);
  }
  for (; m < rows; m++) expand_row(h + m * h_stride, b, b_stride, ranks, columns, y + m * y_stride, ahead);
}

// X is the type of the product's rows.
template <class T, class X>
inline void expand(const Plan& plan, const SlotTable& table, const Fused& fused, int layer,
                   const LoraUnit& unit, const float* h, float* y, size_t y_stride, float* scratch, Ahead ahead = {}) {
  const Segment& segment = plan.segments[unit.segment];
  int width = fused.width[unit.part];
  int columns = unit.columns, rows = unit.end - unit.first;
  y += fused.column[unit.part] + unit.column + unit.first * y_stride;
  auto entry_of = [&](int slot) -> const Entry& {
    return table.at(slot, layer, fused.projection[unit.part]);
  };
  if (segment.uses & GAIN) {
    float gains[MOST_COLUMNS];
    auto pick = [&](int slot) {
      const float* gain = entry_of(slot).gain;
      return gain ? gain + unit.column : nullptr;
    };
    if (blend_gains(plan, segment, columns, pick, gains))
      for (int m = 0; m < rows; m++)
        for (int c = 0; c < columns; c++) y[m * y_stride + c] *= gains[c];
  }
  for (int t = segment.term_begin; t < segment.term_end; t++) {
    const Term& term = plan.terms[t];
    const Entry& entry = entry_of(term.slot);
    if (const float* bias = entry.bias)
      for (int m = 0; m < rows; m++)
        for (int c = 0; c < columns; c++)
          y[m * y_stride + c] = multiply_add(term.weight, bias[unit.column + c], y[m * y_stride + c]);
    int ranks = entry.rank, h_stride = table.max_ranks[term.slot];
    if (!ranks) continue;
    const T* b = static_cast<const T*>(entry.b) + unit.column;
    const float* of_term = h + unit.part * plan.h_size + term.h;
    if constexpr (TILED<X>)
      expand_tiles({unit.first, unit.end, segment.origin()}, b, width, ranks, columns, of_term, h_stride, y, y_stride,
                   ahead);
    else
      expand_factor(of_term + size_t(unit.first - segment.origin()) * h_stride, h_stride, b, width, ranks, rows,
                    columns, y, y_stride, scratch, ahead);
  }
}

// The changes of the long segments within a part of the output that the product has just written: rows
// [first, end) and columns [from, to).
template <class T, class X>
inline void expand_joined(const Plan& plan, const SlotTable& table, const Fused& fused, int uses, int layer, int first,
                          int end, int from, int to, const float* h, float* y, size_t y_stride, float* scratch) {
  for (int s = 0; s < int(plan.segments.size()); s++) {
    const Segment& segment = plan.segments[s];
    if (!(segment.uses & uses) || !LORA_UNITS<X>.joined(segment)) continue;
    LoraUnit unit = {s, 0, std::max(first, segment.first), std::min(end, segment.end), 0, 0, 0, 0};
    if (unit.first >= unit.end) continue;
    for (unit.part = 0; unit.part < fused.parts; unit.part++) {
      int column = fused.column[unit.part];
      unit.column = std::max(from - column, 0);
      unit.columns = std::min(to - column, fused.width[unit.part]) - unit.column;
      if (unit.columns > 0) expand<T, X>(plan, table, fused, layer, unit, h, y, y_stride, scratch);
    }
  }
}

}  // namespace loraplex
