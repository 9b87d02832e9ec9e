// The adapters' part of a projection: y += weight * B (A x), for rows that have an adapter.
//
// Rows that carry the same mix lie side by side and form a segment. Shrink (h = A x) and expand
// (y += B h) read each adapter's matrices once for a whole segment. Every element of h is one dot
// product of its own, every element of y one chain over the ranks: the segment changes the speed,
// never the bits.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace loraplex {

constexpr int PROJECTIONS = 7;
constexpr int LORA_ROWS = 16;      // rows of a unit
constexpr int LORA_RANKS = 32;     // ranks of a shrink unit
constexpr int LORA_COLUMNS = 512;  // outputs of an expand unit

// An adapter that nobody else in the batch uses comes from memory, a few cache lines at a time and
// too short for the hardware to see a stream. So what comes next is asked for ahead of its use.
constexpr int AHEAD_PER_STEP = LANES > 8 ? LANES / 8 : 1;
constexpr int COLUMNS_AHEAD = 96;

// The resident adapters, [slots][layers][7]: addresses of A [r][in] and of transposed B [r][out].
struct AdapterTable {
  const uint64_t* a;
  const uint64_t* b;
  const int32_t* ranks;
  const int32_t* max_ranks;  // [slots]
  int32_t layers;
  int32_t reserved;

  size_t at(int slot, int layer, int projection) const {
    return (size_t(slot) * layers + layer) * PROJECTIONS + projection;
  }
};

struct Term {
  int slot;
  float weight;
  size_t h;  // where this term's [rows][max_rank] floats begin, per projection of the fused matrix
};

struct Segment {
  int first, end;            // rows
  int term_begin, term_end;  // into Plan::terms
};

struct LoraUnit {
  int segment, part, first, end;
  int term, rank;  // shrink
  int column;      // expand
};

// One fused matrix as the adapters see it: up to three projections, each with its columns.
struct Fused {
  int parts;
  int projection[3];
  int column[3], width[3];
};

// Who adapts which rows in this step. The units are the same in every layer.
struct Plan {
  std::vector<Term> terms;
  std::vector<Segment> segments;
  size_t h_size = 0;  // floats per part

  bool empty() const { return segments.empty(); }

  std::vector<LoraUnit> shrink_units(const Fused& fused, const AdapterTable& table) const {
    std::vector<LoraUnit> units;
    for (int s = 0; s < int(segments.size()); s++)
      for (int t = segments[s].term_begin; t < segments[s].term_end; t++)
        for (int part = 0; part < fused.parts; part++)
          for (int rank = 0; rank < table.max_ranks[terms[t].slot]; rank += LORA_RANKS)
            for (int row = segments[s].first; row < segments[s].end; row += LORA_ROWS)
              units.push_back({s, part, row, std::min(row + LORA_ROWS, segments[s].end), t, rank, 0});
    return units;
  }

  std::vector<LoraUnit> expand_units(const Fused& fused) const {
    std::vector<LoraUnit> units;
    for (int s = 0; s < int(segments.size()); s++)
      for (int part = 0; part < fused.parts; part++)
        for (int column = 0; column < fused.width[part]; column += LORA_COLUMNS)
          for (int row = segments[s].first; row < segments[s].end; row += LORA_ROWS)
            units.push_back({s, part, row, std::min(row + LORA_ROWS, segments[s].end), 0, 0, column});
    return units;
  }
};

// h[m][r] = x[m] . a[r], for M rows and R ranks at once.
template <int M, int R, class T>
inline void dots(const float* x, size_t x_stride, const T* a, int in, float scale, float* h, int h_stride) {
  vf sums[M][R] = {};
  int k = 0, row = 0;
  for (; k + LANES <= in; k += LANES) {
    for (int i = 0; i < AHEAD_PER_STEP; i++, row = row + 1 == R ? 0 : row + 1)
      __builtin_prefetch(a + size_t(R + row) * in + k);
    vf xs[M];
    for (int m = 0; m < M; m++) xs[m] = load(x + m * x_stride + k);
    for (int r = 0; r < R; r++) {
      vf as = load(a + size_t(r) * in + k);
      for (int m = 0; m < M; m++) sums[m][r] = xs[m] * as + sums[m][r];
    }
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) {
      float total = sum(sums[m][r]);
      for (int i = k; i < in; i++) total = x[m * x_stride + i] * load1(a + size_t(r) * in + i) + total;
      h[m * h_stride + r] = total * scale;
    }
}

template <int M, class T>
inline void shrink_rows(const float* x, size_t x_stride, const T* a, int in, int ranks, float scale,
                        float* h, int h_stride) {
  int r = 0;
  for (; r + 4 <= ranks; r += 4) dots<M, 4>(x, x_stride, a + size_t(r) * in, in, scale, h + r, h_stride);
  for (; r < ranks; r++) dots<M, 1>(x, x_stride, a + size_t(r) * in, in, scale, h + r, h_stride);
}

template <class T>
inline void shrink(const Plan& plan, const AdapterTable& table, const Fused& fused, int layer,
                   const LoraUnit& unit, const float* x, int in, float* h) {
  const Term& term = plan.terms[unit.term];
  size_t entry = table.at(term.slot, layer, fused.projection[unit.part]);
  int ranks = std::min(table.ranks[entry] - unit.rank, LORA_RANKS);
  if (ranks <= 0) return;
  int h_stride = table.max_ranks[term.slot];
  const T* a = reinterpret_cast<const T*>(table.a[entry]) + size_t(unit.rank) * in;
  h += unit.part * plan.h_size + term.h + unit.rank;
  const T* b = reinterpret_cast<const T*>(table.b[entry]) + size_t(unit.rank) * fused.width[unit.part];
  for (int r = 0; r < ranks; r++)  // where the expansion begins
    for (int c = 0; c < COLUMNS_AHEAD; c += 64 / sizeof(T))
      __builtin_prefetch(b + size_t(r) * fused.width[unit.part] + c, 0, 2);
  int begin = plan.segments[unit.segment].first;
  int m = unit.first;
  for (; m + 2 <= unit.end; m += 2)
    shrink_rows<2>(x + size_t(m) * in, in, a, in, ranks, term.weight, h + size_t(m - begin) * h_stride, h_stride);
  if (m < unit.end)
    shrink_rows<1>(x + size_t(m) * in, in, a, in, ranks, term.weight, h + size_t(m - begin) * h_stride, h_stride);
}

// y[m][0:C lanes] += sum over r of h[m][r] * b[r], for M rows.
template <int M, int C, class T>
inline void accumulate(const float* h, int h_stride, const T* b, int width, int ranks, float* y, size_t y_stride) {
  vf sums[M][C] = {};
  for (int r = 0; r < ranks; r++) {
    vf bs[C];
    __builtin_prefetch(b + size_t(r) * width + COLUMNS_AHEAD);
    for (int c = 0; c < C; c++) bs[c] = load(b + size_t(r) * width + c * LANES);
    for (int m = 0; m < M; m++)
      for (int c = 0; c < C; c++) sums[m][c] = h[m * h_stride + r] * bs[c] + sums[m][c];
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) {
      float* at = y + m * y_stride + c * LANES;
      store(at, load(at) + sums[m][c]);
    }
}

template <int M, class T>
inline void expand_rows(const float* h, int h_stride, const T* b, int width, int ranks, int columns,
                        float* y, size_t y_stride) {
  int c = 0;
  for (; c + 4 * LANES <= columns; c += 4 * LANES)
    accumulate<M, 4>(h, h_stride, b + c, width, ranks, y + c, y_stride);
  for (; c + LANES <= columns; c += LANES)
    accumulate<M, 1>(h, h_stride, b + c, width, ranks, y + c, y_stride);
  for (; c < columns; c++)
    for (int m = 0; m < M; m++) {
      float total = 0;
      for (int r = 0; r < ranks; r++) total = h[m * h_stride + r] * load1(b + size_t(r) * width + c) + total;
      y[m * y_stride + c] += total;
    }
}

template <class T>
inline void expand(const Plan& plan, const AdapterTable& table, const Fused& fused, int layer,
                   const LoraUnit& unit, const float* h, float* y, size_t y_stride) {
  const Segment& segment = plan.segments[unit.segment];
  int width = fused.width[unit.part];
  int columns = std::min(LORA_COLUMNS, width - unit.column);
  y += fused.column[unit.part] + unit.column;
  for (int t = segment.term_begin; t < segment.term_end; t++) {
    const Term& term = plan.terms[t];
    size_t entry = table.at(term.slot, layer, fused.projection[unit.part]);
    int ranks = table.ranks[entry], h_stride = table.max_ranks[term.slot];
    if (!ranks) continue;
    const T* b = reinterpret_cast<const T*>(table.b[entry]) + unit.column;
    const float* rows = h + unit.part * plan.h_size + term.h;
    int m = unit.first;
    for (; m + 2 <= unit.end; m += 2)
      expand_rows<2>(rows + size_t(m - segment.first) * h_stride, h_stride, b, width, ranks, columns,
                     y + m * y_stride, y_stride);
    if (m < unit.end)
      expand_rows<1>(rows + size_t(m - segment.first) * h_stride, h_stride, b, width, ranks, columns,
                     y + m * y_stride, y_stride);
  }
}

}  // namespace loraplex
