// The products of training with a base matrix W [out][in], forward x W^T and back g W, and with the head.
#pragma once

#include "multiply.h"
#include "unpack.h"

#if LORAPLEX_ORDER
namespace loraplex {

constexpr int MOST_ROWS = 2048;         // that are in tiles at a time
constexpr size_t PANEL_BYTES = 600000;  // of right tiles of a unit of work, which stay in the second-level cache

// Tiles of columns of a unit of work: several, so that left tiles are read less often, but units for all threads.
inline int panel_tiles(int columns, int depth, int threads) {
  for (int count : {6, 4}) {
    bool fits = size_t(count) * TILE_ROWS * depth * sizeof(bf16) <= PANEL_BYTES;
    if (fits && tiles(columns, count * TILE_ROWS) >= 2 * threads) return count;
  }
  return 2;
}

// c = left * right. left(row, input, tile) and right(input, column, tile) write tiles, whatever they contain;
// put(row, column, c) takes products [32][32], of which those within `rows` and `columns` count.
template <class Left, class Right, class Put>
inline void product(int rows, int depth, int columns, int threads, Left left, Right right, Put put) {
  static thread_local Scratch<bf16> shared;
  int steps = tiles(depth, TILE_INPUTS), width = panel_tiles(columns, depth, threads);
  int most = std::min(rows, MOST_ROWS);
  bf16* a = shared.of(size_t(tiles(most, 2 * TILE_ROWS)) * 2 * steps * TILE);
  for (int first = 0; first < rows; first += MOST_ROWS) {
    int groups = tiles(std::min(rows - first, MOST_ROWS), TILE_ROWS), panels = tiles(columns, width * TILE_ROWS);
    Units units;
#pragma omp parallel num_threads(threads)
    {
      static thread_local Scratch<bf16> own;
      bf16* b = nullptr;
      units.run([&] { b = own.of(size_t(width) * steps * TILE); });
      alignas(64) float c[32 * 32];
      TileRegisters registers;
#pragma omp for schedule(static)
      for (int g = 0; g < groups; g++)
        for (int s = 0; s < steps; s++)
          left(first + g * TILE_ROWS, s * TILE_INPUTS, a + (size_t(g) * steps + s) * TILE);
#pragma omp for schedule(dynamic, 1)
      for (int panel = 0; panel < panels; panel++) {
        if (!b) continue;
        int column = panel * width * TILE_ROWS, count = std::min(width, tiles(columns - column, TILE_ROWS));
        for (int t = 0; t < count; t++)
          for (int s = 0; s < steps; s++)
            right(s * TILE_INPUTS, column + t * TILE_ROWS, b + (size_t(t) * steps + s) * TILE);
        size_t next = size_t(steps) * TILE;
        for (int g = 0; g < groups; g += 2)
          for (int t = 0; t < count; t += 2) {
            const bf16 *at = a + g * next, *bt = b + t * next;
            bool two_rows = g + 1 < groups, two_columns = t + 1 < count;
            if (two_rows && two_columns)
              multiply<2, 2>(at, next, bt, next, steps, c, 32, false);
            else if (two_rows)
              multiply<2, 1>(at, next, bt, next, steps, c, 32, false);
            else if (two_columns)
              multiply<1, 2>(at, next, bt, next, steps, c, 32, false);
            else
              multiply<1, 1>(at, next, bt, next, steps, c, 32, false);
            put(first + g * TILE_ROWS, column + t * TILE_ROWS, c);
          }
      }
    }
    units.check();
  }
}

// An NF4 matrix [out][in] whose rows have whole blocks.
struct Packed {
  const uint8_t* codes;
  const float* maxima;
  int out, in;
  Nf4Table table;

  vf weights(int row, int column) const {  // 16 of them
    size_t at = size_t(row) * in + column;
    return table(neighbours(codes + at / 2), 0) * maxima[at / BLOCK];
  }
  void columns(int input, int row, bf16* to) const {  // right tile of x W^T
    alignas(64) bf16 rows[TILE];
    if (row + 16 > out) std::memset(rows, 0, sizeof rows);
    for (int r = 0; r < std::min(16, out - row); r++) {
      put16(rows + r * TILE_INPUTS, weights(row + r, input));
      put16(rows + r * TILE_INPUTS + 16, weights(row + r, input + 16));
    }
    transpose(rows, to);
  }
  void pairs(int row, int column, bf16* to) const {  // right tile of g W
    for (int p = 0; p < 16; p++) {
      vf even = row + 2 * p < out ? weights(row + 2 * p, column) : vf{};
      vf odd = row + 2 * p + 1 < out ? weights(row + 2 * p + 1, column) : vf{};
      vu both = paired(even, odd);
      std::memcpy(to + p * TILE_INPUTS, &both, 64);
    }
  }
};

// y [rows][out] = x [rows][in] W^T, or with `back` y [rows][in] = x [rows][out] W.
inline void base_product(const Packed& w, const bf16* x, int rows, bool back, bf16* y, int threads) {
  int depth = back ? w.out : w.in, columns = back ? w.in : w.out;
  auto left = [&](int row, int input, bf16* to) {
    tile_of_rows(x + size_t(row) * depth + input, depth, rows - row, depth - input, to);
  };
  auto put = [&](int row, int column, const float* c) {
    put_rows(c, 32, std::min(32, rows - row), std::min(32, columns - column), y + size_t(row) * columns + column,
             columns, false);
  };
  if (back)
    product(rows, depth, columns, threads, left, [&](int i, int n, bf16* to) { w.pairs(i, n, to); }, put);
  else
    product(rows, depth, columns, threads, left, [&](int i, int n, bf16* to) { w.columns(i, n, to); }, put);
}

// scores [rows][vocab] = x [rows][width] head^T
inline void head_product(const bf16* head, int vocab, int width, const bf16* x, int rows, bf16* scores, int threads) {
  product(
      rows, width, vocab, threads,
      [&](int row, int i, bf16* to) { tile_of_rows(x + size_t(row) * width + i, width, rows - row, width - i, to); },
      [&](int i, int n, bf16* to) { tile_of_columns(head + size_t(n) * width + i, width, width - i, vocab - n, to); },
      [&](int row, int n, const float* c) {
        put_rows(c, 32, std::min(32, rows - row), std::min(32, vocab - n), scores + size_t(row) * vocab + n, vocab,
                 false);
      });
}

// out [rows][width] += g [rows][vocab] head, in parts of the vocabulary; out is float.
inline void head_gradient(const bf16* head, int vocab, int width, const bf16* g, int rows, float* out, int threads) {
  constexpr int PART = 3072;
  for (int start = 0; start < vocab; start += PART) {
    int depth = std::min(PART, vocab - start);
    product(
        rows, depth, width, threads,
        [&](int row, int i, bf16* to) {
          tile_of_rows(g + size_t(row) * vocab + start + i, vocab, rows - row, depth - i, to);
        },
        [&](int i, int n, bf16* to) {
          tile_of_pairs(head + size_t(start + i) * width + n, width, depth - i, width - n, to);
        },
        [&](int row, int n, const float* c) {
          put_rows(c, 32, std::min(32, rows - row), std::min(32, width - n), out + size_t(row) * width + n, width,
                   true);
        });
  }
}

}  // namespace loraplex
#endif
