// What both orders of products of bfloat16 share: the rows that they read, the units into which they are
// divided, and how sums are written.
#pragma once

#include "blocked.h"
#include "matmul.h"

#if LORAPLEX_ORDER

namespace loraplex {

constexpr int GROUPS_AT_ONCE = 16;  // groups of 16 rows of a unit, so that unpacked weights are used often
constexpr int UNITS_AHEAD = 2;  // a guess: the number of threads
constexpr int UNIT_PANELS = ORDER == Order::TILES ? 2 : 1;

// The rows of a product: as they are, and for TILES with rows and pairs of inputs of each tile exchanged.
struct Inputs {
  Blocked rows;
  bf16* exchanged;

  // Units of `exchange`.
  int units(int count) const {
    if (ORDER != Order::TILES) return 0;
    return (int(Blocked::size(count, rows.width) / TILE) + TILES_AT_ONCE - 1) / TILES_AT_ONCE;
  }
  void exchange(int count, int unit) const;

 private:
  static constexpr int TILES_AT_ONCE = 6;
};

// Exchanges rows and columns of 16 x 16 elements of four bytes.
inline void transpose(vf (&rows)[16]) {
  for (int stage = 0; stage < 4; stage++) {
    vf next[16];
    for (int i = 0; i < 8; i++) {
      next[2 * i] = interleave_low(rows[i], rows[i + 8]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + 8]);
    }
    std::copy(next, next + 16, rows);
  }
}

inline void Inputs::exchange(int count, int unit) const {
  int end = std::min(int(Blocked::size(count, rows.width) / TILE), (unit + 1) * TILES_AT_ONCE);
  for (int i = unit * TILES_AT_ONCE; i < end; i++) {
    vf pairs[16];
    for (int r = 0; r < 16; r++) std::memcpy(&pairs[r], rows.data + size_t(i) * TILE + r * TILE_INPUTS, 64);
    transpose(pairs);
    for (int r = 0; r < 16; r++) std::memcpy(exchanged + size_t(i) * TILE + r * TILE_INPUTS, &pairs[r], 64);
  }
  written(exchanged);
}

// The groups of 16 rows, and the panels, that a unit of a tile computes.
struct Part {
  int group, groups, panel, panels;

  static int row_chunks(const Tile& tile) {
    int groups = (tile.first + tile.rows - 1) / TILE_ROWS - tile.first / TILE_ROWS + 1;
    return (groups + GROUPS_AT_ONCE - 1) / GROUPS_AT_ONCE;
  }
  static int panel_chunks(const Tile& tile) { return (tile.panels() + UNIT_PANELS - 1) / UNIT_PANELS; }
  static int units(const Tile& tile) { return tile.rows ? panel_chunks(tile) * row_chunks(tile) : 0; }

  Part(const Tile& tile, int unit) {
    int first_panel = tile.column / PANEL, last = (tile.first + tile.rows - 1) / TILE_ROWS;
    panel = first_panel + unit % panel_chunks(tile) * UNIT_PANELS;
    panels = std::min(UNIT_PANELS, first_panel + tile.panels() - panel);
    group = tile.first / TILE_ROWS + unit / panel_chunks(tile) * GROUPS_AT_ONCE;
    groups = std::min(GROUPS_AT_ONCE, last + 1 - group);
  }

  // What it writes: rows and columns of the tile.
  int first_row(const Tile& tile) const { return std::max(tile.first, group * TILE_ROWS); }
  int end_row(const Tile& tile) const { return std::min(tile.first + tile.rows, (group + groups) * TILE_ROWS); }
  int first_column(const Tile& tile) const { return std::max(tile.column, panel * PANEL); }
  int end_column(const Tile& tile) const { return std::min(tile.end, (panel + panels) * PANEL); }
};

// Adds the bias to the sums [16 rows][16 outputs] of a group and a panel, and writes what lies in the tile.
inline void write_sums(const Matrix& w, const Tile& tile, int group, int panel, const float* sums, float* y,
                       size_t y_stride) {
  int row = std::max(tile.first, group * TILE_ROWS), end = std::min(tile.first + tile.rows, (group + 1) * TILE_ROWS);
  int from = std::max(tile.column, panel * PANEL), to = std::min({tile.end, w.out, (panel + 1) * PANEL});
  for (; row < end; row++) {
    const float* at = sums + row % TILE_ROWS * PANEL - panel * PANEL;
    float* out = y + row * y_stride;
    if (to - from == PANEL) {
      vf v = load(at + from);
      store(out + from, w.bias ? v + load(w.bias + from) : v);
    } else {
      for (int o = from; o < to; o++) out[o] = w.bias ? at[o] + w.bias[o] : at[o];
    }
  }
}

}  // namespace loraplex

#endif  // LORAPLEX_ORDER
