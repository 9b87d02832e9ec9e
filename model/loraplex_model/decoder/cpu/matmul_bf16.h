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

#include "matmul_pairs.h"
#include "matmul_tiles.h"

#if LORAPLEX_ORDER

namespace loraplex {

// One unit of y = x W^T + bias for weights in float32, whatever the order of the library is: the arithmetic
// of matmul.h, on rows of bfloat16.
inline void wide_unit(const Matrix& w, const Tile& tile, const Inputs& x, float* y, size_t y_stride, int unit) {
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
    wide_unit(w, tile, x, y, y_stride, unit);
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
