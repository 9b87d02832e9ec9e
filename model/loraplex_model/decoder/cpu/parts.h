// What both orders of products of bfloat16 share: the rows that they read, the units into which they are
// divided, and how sums are written.
#pragma once

#include "blocked.h"
#include "matmul.h"

#if LORAPLEX_ORDER

namespace loraplex {

constexpr int GROUPS_AT_ONCE = 16;  // groups of 16 rows of a unit, so that unpacked weights are used often
constexpr int UNIT_PANELS = ORDER == Order::TILES ? 2 : 1;

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

// The rows of a product, in the form that its order reads. PAIRS: `rows`. TILES: `exchanged`, which is the same
// memory, with rows and pairs of inputs of each tile exchanged: [16 pairs][columns][2]. With fewer than 16 rows the
// lines of a tile that AMX loads overlap: they end with what belongs to no row. So few rows need few lines of cache.
struct Inputs {
  Blocked rows;
  bf16* exchanged;
  int columns;  // a power of two, at most 16, for as many rows of a group

  int tile() const { return columns * TILE_INPUTS; }  // elements from one tile to the next

  // Writes elements [first, first + count) of row t. The padding is written with the last of them.
  void put(int t, int first, int count, const float* x) const {
    if (ORDER != Order::TILES) return rows.put(t, first, count, x);
    int i = first, end = first + count;
    for (; i < end && i % TILE_INPUTS; i++) store1(at(t, i), x[i - first]);
    for (; i + TILE_INPUTS <= end; i += TILE_INPUTS) {
      alignas(64) uint32_t pairs[LANES];
      vu rounded = rounded_pairs(load(x + i - first), load(x + i - first + LANES));
      std::memcpy(pairs, &rounded, sizeof pairs);
      bf16* to = at(t, i);
      for (int k = 0; k < LANES; k++) std::memcpy(to + k * 2 * columns, pairs + k, sizeof pairs[k]);
    }
    for (; i < end; i++) store1(at(t, i), x[i - first]);
    if (end == rows.width)
      for (; i < Blocked::tiles(end) * TILE_INPUTS; i++) *at(t, i) = {0};
    written(exchanged);
  }

  // The same for `count` elements of each of the first `used` rows of the group of row t, whose other rows it may
  // overwrite. `first` begins a tile; the rows of x are `stride` floats apart.
  void put_group(int t, int used, int first, int count, const float* x, size_t stride) const {
    constexpr int FEW = 4;  // rows that are faster written one by one
    if (ORDER != Order::TILES || used <= FEW) {
      for (int r = 0; r < used; r++) put(t + r, first, count, x + r * stride);
      return;
    }
    int i = 0;
    for (; i + TILE_INPUTS <= count; i += TILE_INPUTS) put_tile(used, x + i, stride, at(t, first + i));
    if (i < count) {
      float last[TILE_ROWS * TILE_INPUTS] = {};
      for (int r = 0; r < used; r++) std::copy_n(x + r * stride + i, count - i, last + r * TILE_INPUTS);
      put_tile(used, last, TILE_INPUTS, at(t, first + i));
    }
    written(exchanged);
  }

  // Reads elements [first, first + count) of row t.
  void get(int t, int first, int count, float* x) const {
    if (ORDER != Order::TILES) return rows.get(t, first, count, x);
    for (int i = first; i < first + count; i++) x[i - first] = load1(at(t, i));
  }

 private:
  // Writes a tile of more than four rows; those after the last one repeat it.
  void put_tile(int used, const float* x, size_t stride, bf16* to) const {
    vf pairs[TILE_ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < TILE_ROWS; r++) {
      const float* from = x + std::min(r, used - 1) * stride;
      pairs[r] = bit_cast<vf>(rounded_pairs(load(from), load(from + LANES)));
    }
    transpose(pairs);
    if (columns == TILE_ROWS)
      for (int k = 0; k < TILE_ROWS; k++) std::memcpy(to + k * TILE_INPUTS, &pairs[k], sizeof pairs[k]);
    else
      for (int k = 0; k < TILE_ROWS; k++) std::memcpy(to + k * TILE_ROWS, &pairs[k], sizeof pairs[k] / 2);
  }

  // Element i of row t in `exchanged`.
  bf16* at(int t, int i) const {
    return exchanged + (rows.group(t) - rows.data) + size_t(i / 2) * (2 * columns) + t % TILE_ROWS * 2 + i % 2;
  }
};

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
