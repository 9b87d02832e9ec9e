// The gated unit of an MLP in one product: activation(gate . x) * (up . x), rounded to bfloat16 and written as
// the next product reads it. For passes in which no adapter changes gate or up. The arithmetic is that of the
// product and of `activate_row`, so a row's bits are the same as in other passes.
#pragma once

#include "activations.h"
#include "inputs.h"

#if LORAPLEX_ORDER

namespace loraplex {

inline vf activated(vf x, int activation) {
  switch (activation) {
    case GELU: return gelu(x);
    case GELU_TANH: return gelu_tanh(x);
    default: return silu(x);
  }
}

// Whether the matrix of gate and up, one after the other, has the form that `gated_unit` needs.
inline bool gates_fit(const Matrix& w) { return w.kind == Kind::nf4_packed && w.out % (2 * PANEL) == 0; }

// Units for rows [0, rows): a panel of gate and that of up, for a number of groups of rows.
inline int gated_units(const Matrix& w, int rows) {
  Tile gate{0, rows, 0, w.out / 2};
  return w.out / 2 / PANEL * Part::row_chunks(gate);
}

#if LORAPLEX_ORDER == 2

// A pair of bfloat16 in each lane, of two vectors of floats; to the nearest, ties to even; NaN stays NaN.
inline vu lane_pairs(vf first, vf second) {
  bf16 halves[2 * LANES];
  store(halves, first);
  store(halves + LANES, second);
  typedef uint16_t v16 __attribute__((vector_size(2 * LANES)));
  v16 low, high;
  std::memcpy(&low, halves, sizeof low);
  std::memcpy(&high, halves + LANES, sizeof high);
  return __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16;
}

// Writes to `out` in exchanged form only.
inline void gated_unit(const Matrix& w, int activation, int rows, const Inputs& x, const Inputs& out, int unit) {
  int panels = w.out / 2 / PANEL, panel = unit % panels;
  int group = unit / panels * GROUPS_AT_ONCE;
  int groups = std::min(GROUPS_AT_ONCE, (rows + TILE_ROWS - 1) / TILE_ROWS - group);
  alignas(64) bf16 scratch[2 * KEPT_TILES * TILE];
  alignas(64) float sums[GROUPS_AT_ONCE * 2 * 256];
  sum_tiles({w, panel, 2, panels, UNITS_AHEAD, scratch}, x, group, groups, sums);
  for (int g = 0; g < groups; g++) {
    const float *gate = sums + g * 512, *up = gate + 256;
    bf16* to = out.exchanged + size_t(group + g) * Blocked::tiles(w.out / 2) * TILE + panel * PANEL * out.columns;
    auto value = [&](int o) {
      vf a = load(gate + o * 16), b = load(up + o * 16);
      if (w.bias) a += w.bias[panel * PANEL + o], b += w.bias[(panels + panel) * PANEL + o];
      return activated(a, activation) * b;
    };
    for (int o = 0; o < PANEL; o += 2) {
      vu pairs = lane_pairs(value(o), value(o + 1));
      std::memcpy(to + o * out.columns, &pairs, 4 * out.columns);
    }
    if (panels % 2 && panel + 1 == panels) std::fill_n(to + out.tile() / 2, out.tile() / 2, bf16{0});
  }
}

#else

inline void gated_unit(const Matrix& w, int activation, int rows, const Inputs& x, const Inputs& out, int unit) {
  int panels = w.out / 2 / PANEL, panel = unit % panels;
  int first = unit / panels * GROUPS_AT_ONCE * TILE_ROWS, end = std::min(rows, first + GROUPS_AT_ONCE * TILE_ROWS);
  alignas(64) float gate[TILE_ROWS * PANEL], up[TILE_ROWS * PANEL];
  for (; first < end; first += TILE_ROWS) {
    int count = std::min(TILE_ROWS, end - first);
    some_rows<TILE_ROWS>(count, w, panel, x.rows.at(first, 0), gate);
    some_rows<TILE_ROWS>(count, w, panels + panel, x.rows.at(first, 0), up);
    for (int r = 0; r < count; r++) {
      vf a = load(gate + r * PANEL), b = load(up + r * PANEL);
      if (w.bias) a += load(w.bias + panel * PANEL), b += load(w.bias + (panels + panel) * PANEL);
      float row[PANEL];
      store(row, activated(a, activation) * b);
      out.rows.put(first + r, panel * PANEL, PANEL, row);
    }
  }
}

#endif

}  // namespace loraplex

#endif  // LORAPLEX_ORDER
