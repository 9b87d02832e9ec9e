// y = x W^T + bias for bfloat16 rows x, with sums in float32. Weights are packed for the library's order of
// sums (tiles.h); an output element is one chain of sums over its inputs, the same for any number of rows.
//
// PAIRS, lanes across the outputs of a panel. NF4 codes stand for the quantiles times a constant, rounded;
// a block's products are summed, then multiplied by its absmax over the constant and added to the element:
//   NF4:    codes  uint32 [in / 8][16], lane = output, nibble j = input 8 i + 2 (j % 4) + j / 4
//           absmax float  [in / 64][16], divided by the constant
//   dense:  [in / 2][16][2]
//
// TILES, a row of a tile for each output. NF4 weights become code * absmax, rounded once, as bitsandbytes
// unpacks them to bfloat16:
//   NF4:    codes  uint8 [in / 64][16][32], byte j = inputs j (low half) and 32 + j
//           absmax float [in / 64][16]
//   dense:  [in / 32][16][32]
//
// Panels follow one another; rows of dense matrices are padded with zeros to whole tiles.
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

#if LORAPLEX_ORDER == 1

constexpr float CODE_FACTOR = 1.437005043f;  // of all factors, that with the least error of the 16 rounded codes

// The 16 rounded codes, twice.
inline const bf16* code_table() {
  alignas(64) static const struct Table {
    bf16 codes[32];
    Table() {
      for (int i = 0; i < 32; i++) store1(codes + i, NF4[i % 16] * CODE_FACTOR);
    }
  } table;
  return table.codes;
}

// Four vectors of pairs: 16 outputs times 8 inputs.
struct CodePairs {
#ifdef LORAPLEX_VDPBF16PS
  __m512i table = _mm512_load_si512(code_table());
  vu operator()(vu codes, int j) const {
    return (vu)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)codes, 4 * j), table);
  }
#else
  const bf16* table = code_table();
  vu operator()(vu codes, int j) const {
    vu pairs;
    for (int o = 0; o < 16; o++) {
      uint32_t first = table[codes[o] >> (4 * j) & 15].bits, second = table[codes[o] >> (4 * j + 16) & 15].bits;
      pairs[o] = first | second << 16;
    }
    return pairs;
  }
#endif
};

template <int R>
inline void nf4_rows(const Matrix& w, int panel, const bf16* x, float* sums) {
  const uint32_t* codes = static_cast<const uint32_t*>(w.data) + size_t(panel) * w.in * 2;
  const float* absmax = w.absmax + size_t(panel) * (w.in / BLOCK) * PANEL;
  CodePairs unpack;
  vf totals[R] = {};
  for (int k = 0; k < w.in; k += BLOCK, absmax += PANEL) {
    vf block[R] = {};
    for (int i = 0; i < BLOCK; i += 8, codes += PANEL) {
      vu eight = load(codes);
      const bf16* at = x + i / TILE_INPUTS * TILE + i % TILE_INPUTS;
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        vu pairs = unpack(eight, j);
        for (int r = 0; r < R; r++) block[r] = add_pairs(block[r], pairs, broadcast_pair(at + r * TILE_INPUTS + 2 * j));
      }
    }
    x += BLOCK / TILE_INPUTS * TILE;
    vf scale = load(absmax);
    for (int r = 0; r < R; r++) totals[r] = block[r] * scale + totals[r];
  }
  for (int r = 0; r < R; r++) store(sums + r * PANEL, totals[r]);
}

template <int R>
inline void dense_rows(const Matrix& w, int panel, const bf16* x, float* sums) {
  int steps = Blocked::tiles(w.in);
  const bf16* weights = static_cast<const bf16*>(w.data) + size_t(panel) * steps * TILE;
  vf totals[R] = {};
  for (int s = 0; s < steps; s++, x += TILE)
    for (int k = 0; k < TILE_INPUTS; k += 2, weights += 2 * PANEL) {
      vu pairs = load_pairs(weights);
      for (int r = 0; r < R; r++) totals[r] = add_pairs(totals[r], pairs, broadcast_pair(x + r * TILE_INPUTS + k));
    }
  for (int r = 0; r < R; r++) store(sums + r * PANEL, totals[r]);
}

template <int R>
inline void some_rows(int rows, const Matrix& w, int panel, const bf16* x, float* sums) {
  if (rows == R)
    w.kind == Kind::nf4_packed ? nf4_rows<R>(w, panel, x, sums) : dense_rows<R>(w, panel, x, sums);
  else if constexpr (R > 1)
    some_rows<R - 1>(rows, w, panel, x, sums);
}

inline void packed_unit(const Matrix& w, const Tile& tile, const Inputs& x, float* y, size_t y_stride, int unit) {
  Part part(tile, unit);
  alignas(64) float sums[TILE_ROWS * PANEL];
  for (int group = part.group; group < part.group + part.groups; group++) {
    int first = std::max(tile.first - group * TILE_ROWS, 0);
    int rows = std::min(tile.first + tile.rows - group * TILE_ROWS, TILE_ROWS) - first;
    some_rows<TILE_ROWS>(rows, w, part.panel, x.rows.at(group * TILE_ROWS + first, 0), sums + first * PANEL);
    write_sums(w, tile, group, part.panel, sums, y, y_stride);
  }
}

#else  // TILES

// Tiles of a panel whose weights are kept unpacked, while they pass through the first-level cache: units of
// many groups go through the inputs in slabs of so many tiles, and others overwrite the oldest.
constexpr int KEPT_TILES = 8;

// Two tiles: 16 outputs times the 64 inputs of a block.
inline void unpack_block(const uint8_t* codes, const float* absmax, bf16* out) {
#ifdef LORAPLEX_AMX
  __m512 quantiles = _mm512_load_ps(NF4);
#pragma GCC unroll 4
  for (int o = 0; o < PANEL; o++) {
    __m256i values = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(quantiles, _mm512_set1_ps(absmax[o])));
    __m512i table = _mm512_broadcast_i64x4(values);  // the lookup takes five bits of a code: the fifth is any
    __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(codes + o * 32)));
    _mm512_store_si512(out + o * 32, _mm512_permutexvar_epi16(words, table));
    _mm512_store_si512(out + TILE + o * 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table));
  }
#else
  for (int o = 0; o < PANEL; o++) {
    bf16 table[16];
    store(table, load(NF4) * absmax[o]);
    for (int j = 0; j < 32; j++) {
      out[o * 32 + j] = table[codes[o * 32 + j] & 15];
      out[TILE + o * 32 + j] = table[codes[o * 32 + j] >> 4];
    }
  }
#endif
}

// The weights of up to two panels, tile by tile: dense ones where they lie, NF4 unpacked into `scratch`.
// While one is read, that which is `ahead` panels further is fetched from memory: a unit's weights are too
// few for the hardware to detect, and the thread's next unit is probably so far away.
struct PanelTiles {
  const Matrix& w;
  int panel, panels;
  int step_to_second;  // from the first panel to the second
  int ahead;
  bf16* scratch;  // [UNIT_PANELS][KEPT_TILES] tiles

  bool is_packed() const { return w.kind == Kind::nf4_packed; }

  bf16* kept(int p, int step) const { return scratch + (p * KEPT_TILES + step % KEPT_TILES) * TILE; }

  const bf16* at(int p, int step) const {
    if (is_packed()) return kept(p, step);
    return static_cast<const bf16*>(w.data) + (size_t(panel + p * step_to_second) * Blocked::tiles(w.in) + step) * TILE;
  }

  // Unpacks tiles `step`, which is even, and `step + 1`.
  void unpack(int step) const {
    int blocks = w.in / BLOCK, block = step * TILE_INPUTS / BLOCK;
    for (int p = 0; p < panels; p++) {
      size_t at = (size_t(panel + p * step_to_second) * blocks + block) * PANEL;
      const uint8_t* codes = static_cast<const uint8_t*>(w.data) + at * (BLOCK / 2);
      const float* absmax = w.absmax + at;
      size_t next = size_t(ahead) * blocks * PANEL;
      for (int i = 0; i < BLOCK / 2 * PANEL; i += 64) __builtin_prefetch(codes + next * (BLOCK / 2) + i, 0, 2);
      __builtin_prefetch(absmax + next, 0, 2);
      unpack_block(codes, absmax, kept(p, step));
    }
    written(scratch);
  }
};

// sums[g][p] += weights . x for P panels and G groups, as tiles [16 outputs][16 rows], over the tiles of
// inputs in [first, end). x points to the first one. Sums that begin with tile 0 begin at zero. With UNPACK
// the weights are unpacked on the way, so that one hides the time of the other.
template <int P, int G, bool UNPACK>
inline void multiply_tiles(const PanelTiles& weights, int first, int end, const bf16* x, size_t x_group, float* sums) {
#ifdef LORAPLEX_AMX
  constexpr int SIZE = 256;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (first) {
    _tile_loadd(0, sums, 64);
    if constexpr (P == 2) _tile_loadd(1, sums + SIZE, 64);
    if constexpr (G == 2) _tile_loadd(2, sums + P * SIZE, 64);
    if constexpr (P == 2 && G == 2) _tile_loadd(3, sums + 3 * SIZE, 64);
  }
  for (int s = first; s < end; s++, x += TILE) {
    if (UNPACK && s % 2 == 0) weights.unpack(s);
    _tile_loadd(4, weights.at(0, s), 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (P == 2) {
      _tile_loadd(5, weights.at(1, s), 64);
      _tile_dpbf16ps(1, 5, 6);
    }
    if constexpr (G == 2) {
      _tile_loadd(7, x + x_group, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (P == 2 && G == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  if constexpr (P == 2) _tile_stored(1, sums + SIZE, 64);
  if constexpr (G == 2) _tile_stored(2, sums + P * SIZE, 64);
  if constexpr (P == 2 && G == 2) _tile_stored(3, sums + 3 * SIZE, 64);
#else
  for (int s = first; s < end; s++, x += TILE) {
    if (UNPACK && s % 2 == 0) weights.unpack(s);
    for (int tile = 0; tile < P * G; tile++)
      for (int o = 0; o < PANEL; o++) {
        float* at = sums + tile * 256 + o * 16;
        vf evens = {}, odds = {};
        for (int k = 0; k < TILE_INPUTS / 2; k++) {
          vu a = broadcast_pair(weights.at(tile % P, s) + o * TILE_INPUTS + 2 * k);
          vu b = load_pairs(x + tile / P * x_group + k * TILE_INPUTS);
          evens = even(a) * even(b) + evens;
          odds = odd(a) * odd(b) + odds;
        }
        store(at, s == 0 ? evens + odds : load(at) + (evens + odds));
      }
  }
#endif
}

template <bool UNPACK>
inline void multiply_groups(const PanelTiles& weights, int groups, int first, int end, const bf16* x, size_t x_group,
                            float* sums) {
  if (weights.panels == 2)
    groups == 2 ? multiply_tiles<2, 2, UNPACK>(weights, first, end, x, x_group, sums)
                : multiply_tiles<2, 1, UNPACK>(weights, first, end, x, x_group, sums);
  else
    groups == 2 ? multiply_tiles<1, 2, UNPACK>(weights, first, end, x, x_group, sums)
                : multiply_tiles<1, 1, UNPACK>(weights, first, end, x, x_group, sums);
}

// Sums [groups][panels] of tiles [16 outputs][16 rows] for the groups of rows from `group` on.
inline void sum_tiles(const PanelTiles& weights, const Inputs& x, int group, int groups, float* sums) {
  int steps = Blocked::tiles(weights.w.in), slab = weights.is_packed() && groups > 2 ? KEPT_TILES : steps;
  size_t x_group = size_t(steps) * TILE;
  for (int step = 0; step < steps; step += slab)
    for (int g = 0; g < groups; g += 2) {
      const bf16* from = x.exchanged + (group + g) * x_group + size_t(step) * TILE;
      auto multiply = g == 0 && weights.is_packed() ? multiply_groups<true> : multiply_groups<false>;
      multiply(weights, std::min(2, groups - g), step, std::min(step + slab, steps), from, x_group,
               sums + g * weights.panels * 256);
    }
}

inline void packed_unit(const Matrix& w, const Tile& tile, const Inputs& x, float* y, size_t y_stride, int unit) {
  Part part(tile, unit);
  alignas(64) bf16 scratch[UNIT_PANELS * KEPT_TILES * TILE];
  alignas(64) float sums[GROUPS_AT_ONCE * UNIT_PANELS * 256];
  sum_tiles({w, part.panel, part.panels, 1, UNITS_AHEAD * UNIT_PANELS, scratch}, x, part.group, part.groups, sums);
  for (int g = 0; g < part.groups; g++)
    for (int p = 0; p < part.panels; p++) {
      float* at = sums + (g * part.panels + p) * 256;
      vf rows[16];
      for (int o = 0; o < 16; o++) rows[o] = load(at + o * 16);
      transpose(rows);
      for (int r = 0; r < 16; r++) store(at + r * 16, rows[r]);
      write_sums(w, tile, part.group + g, part.panel + p, at, y, y_stride);
    }
}

#endif  // TILES

// One unit of y = x W^T + bias for weights in float32, whatever the order of the library is: the arithmetic
// of matmul.h, on rows of bfloat16.
inline void wide_unit(const Matrix& w, const Tile& tile, const Blocked& x, float* y, size_t y_stride, int unit) {
  Part part(tile, unit);
  DensePanel<float> panels[] = {{w, part.panel}, {w, part.panel + part.panels - 1}};
  for (int group = part.group; group < part.group + part.groups; group++)
    for (int p = 0; p < part.panels; p++) {
      alignas(64) float sums[TILE_ROWS * PANEL] = {}, rows[TILE_ROWS * BLOCK], weights[BLOCK * PANEL];
      for (int k = 0; k < w.in; k += BLOCK) {
        int end = std::min(k + BLOCK, w.in);
        for (int r = 0; r < TILE_ROWS; r++) x.get(group * TILE_ROWS + r, k, end - k, rows + r * BLOCK);
        panels[p].each(k, end, [&](int i, const vf* values) { store(weights + (i - k) * PANEL, values[0]); });
        for (int m = 0; m < TILE_ROWS; m += MAX_ROWS)
          expanded_rows<MAX_ROWS>(std::min(MAX_ROWS, TILE_ROWS - m), panels[p], weights, rows + m * BLOCK, BLOCK, 0,
                                  end - k, sums + m * PANEL);
      }
      write_sums(w, tile, group, part.panel + p, sums, y, y_stride);
    }
}

inline int matmul_units(const Tile& tile, const Inputs&) { return Part::units(tile); }

inline Part part_of(const Tile& tile, const Inputs&, int unit) { return Part(tile, unit); }

inline void matmul_unit(const Matrix& w, const Tile& tile, const Inputs& x, float* y, size_t y_stride, int unit) {
  if (w.kind == Kind::f32)
    wide_unit(w, tile, x.rows, y, y_stride, unit);
  else
    packed_unit(w, tile, x, y, y_stride, unit);
}

// Packs uint8 [out][in / 2], two codes per byte with the first in the high half, and absmax [out][in / 64].
// Outputs beyond the last get an absmax of zero.
inline void pack_nf4(const uint8_t* packed, const float* absmax, int out, int in, void* codes, float* scales,
                     int panel) {
  int blocks = in / BLOCK;
  auto code = [&](size_t row, int i) -> uint32_t {
    if (row >= size_t(out)) return 7;  // zero
    uint8_t both = packed[(row * in + i) / 2];
    return i % 2 ? both & 15 : both >> 4;
  };
  for (int lane = 0; lane < PANEL; lane++) {
    size_t row = size_t(panel) * PANEL + lane;
    for (int b = 0; b < blocks; b++) {
      size_t at = (size_t(panel) * blocks + b) * PANEL + lane;
      scales[at] = row < size_t(out) ? absmax[row * blocks + b] : 0;
#if LORAPLEX_ORDER == 1
      scales[at] /= CODE_FACTOR;
      for (int i = 0; i < BLOCK; i += 8) {
        uint32_t word = 0;
        for (int j = 0; j < 8; j++) word |= code(row, b * BLOCK + i + 2 * (j % 4) + j / 4) << (4 * j);
        static_cast<uint32_t*>(codes)[(size_t(panel) * (in / 8) + (b * BLOCK + i) / 8) * PANEL + lane] = word;
      }
#else
      for (int j = 0; j < 32; j++)
        static_cast<uint8_t*>(codes)[at * 32 + j] = code(row, b * BLOCK + j) | code(row, b * BLOCK + 32 + j) << 4;
#endif
    }
  }
}

}  // namespace loraplex

#endif  // LORAPLEX_ORDER
