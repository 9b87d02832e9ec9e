// Products of bfloat16 in the order PAIRS: lanes across the outputs of a panel. matmul_bf16.h describes the
// form of the weights.
#pragma once

#include "parts.h"

#if LORAPLEX_ORDER == 1

namespace loraplex {

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

}  // namespace loraplex

#endif
