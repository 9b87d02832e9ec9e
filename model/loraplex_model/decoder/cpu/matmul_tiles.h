// Products of bfloat16 in the order TILES: a tile of sums has 16 outputs and 16 rows. matmul_bf16.h describes
// the form of the weights.
#pragma once

#include "parts.h"

#if LORAPLEX_ORDER == 2

namespace loraplex {

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
// inputs in [first, end). x points to the first one, and the next one is `x_tile` elements further. Sums that begin
// with tile 0 begin at zero. With UNPACK the weights are unpacked on the way, so that one hides the time of the other.
template <int P, int G, bool UNPACK>
inline void multiply_tiles(const PanelTiles& weights, int first, int end, const bf16* x, int x_tile, size_t x_group,
                           float* sums) {
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
  for (int s = first; s < end; s++, x += x_tile) {
    if (UNPACK && s % 2 == 0) weights.unpack(s);
    _tile_loadd(4, weights.at(0, s), 64);
    _tile_loadd(6, x, x_tile / 8);
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
  for (int s = first; s < end; s++, x += x_tile) {
    if (UNPACK && s % 2 == 0) weights.unpack(s);
    for (int tile = 0; tile < P * G; tile++)
      for (int o = 0; o < PANEL; o++) {
        float* at = sums + tile * 256 + o * 16;
        vf evens = {}, odds = {};
        for (int k = 0; k < TILE_INPUTS / 2; k++) {
          vu a = broadcast_pair(weights.at(tile % P, s) + o * TILE_INPUTS + 2 * k);
          vu b = load_pairs(x + tile / P * x_group + k * (x_tile / 16));
          evens = even(a) * even(b) + evens;
          odds = odd(a) * odd(b) + odds;
        }
        store(at, s == 0 ? evens + odds : load(at) + (evens + odds));
      }
  }
#endif
}

template <bool UNPACK>
inline void multiply_groups(const PanelTiles& weights, int groups, int first, int end, const bf16* x, int x_tile,
                            size_t x_group, float* sums) {
  if (weights.panels == 2)
    groups == 2 ? multiply_tiles<2, 2, UNPACK>(weights, first, end, x, x_tile, x_group, sums)
                : multiply_tiles<2, 1, UNPACK>(weights, first, end, x, x_tile, x_group, sums);
  else
    groups == 2 ? multiply_tiles<1, 2, UNPACK>(weights, first, end, x, x_tile, x_group, sums)
                : multiply_tiles<1, 1, UNPACK>(weights, first, end, x, x_tile, x_group, sums);
}

// Sums [groups][panels] of tiles [16 outputs][16 rows] for the groups of rows from `group` on.
inline void sum_tiles(const PanelTiles& weights, const Inputs& x, int group, int groups, float* sums) {
  int steps = Blocked::tiles(weights.w.in), slab = weights.is_packed() && groups > 2 ? KEPT_TILES : steps;
  size_t x_group = size_t(steps) * TILE;
  for (int step = 0; step < steps; step += slab)
    for (int g = 0; g < groups; g += 2) {
      const bf16* from = x.exchanged + (group + g) * x_group + size_t(step) * x.tile();
      auto multiply = g == 0 && weights.is_packed() ? multiply_groups<true> : multiply_groups<false>;
      multiply(weights, std::min(2, groups - g), step, std::min(step + slab, steps), from, x.tile(), x_group,
               sums + g * weights.panels * 256);
    }
}

inline void packed_unit(const Matrix& w, const Tile& tile, const Inputs& x, float* y, size_t y_stride, int unit) {
  Part part(tile, unit);
  alignas(64) bf16 scratch[UNIT_PANELS * KEPT_TILES * TILE];
  alignas(64) float sums[GROUPS_AT_ONCE * UNIT_PANELS * 256];
  sum_tiles({w, part.panel, part.panels, 1, UNIT_PANELS, scratch}, x, part.group, part.groups, sums);
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

}  // namespace loraplex

#endif
