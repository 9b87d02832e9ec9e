// Low-rank changes of a product, y += (x A) B for some rows and columns, and their gradients.
#pragma once

#include <vector>

#include "multiply.h"

#if LORAPLEX_ORDER
namespace loraplex {

// The change of one module: A is [rank][in], B [rank][columns] with any strides, its outputs begin at `column` of y.
struct LowRank {
  const float *a, *b;
  int64_t b_stride, b_step;  // of B's rows and columns
  int rank, column, columns;
  float *to_a, *to_b;  // gradients [rank][in], [rank][columns]
};

// Changes of the same rows that read the same inputs x [rows][in]; `reduced` is x A of all of them, [rows][ranks].
struct Reading {
  const bf16* x;
  bf16* reduced;
  bf16* to_x;  // gradient [rows][in], or null
  const LowRank* changes;
  int row, rows, count, ranks;
};

// A product that is changed: y [..][width], or in the derivative its gradient.
struct Changed {
  bf16* y;
  int64_t width;
  int in;
  const Reading* readings;
  int count;
};

// Right tiles of a matrix [rows][columns] with any strides, as inputs x columns: [tiles of columns][steps of inputs].
// With `turned` its rows are the columns.
inline void right_tiles(const float* from, int64_t stride, int64_t step, int rows, int columns, bool turned, bf16* to) {
  if (turned) {
    std::swap(stride, step);
    std::swap(rows, columns);
  }
  int steps = tiles(rows, TILE_INPUTS);
  for (int t = 0; t < tiles(columns, TILE_INPUTS) * 2; t++)
    for (int s = 0; s < steps; s++, to += TILE) {
      int depth = rows - s * TILE_INPUTS, left = std::max(0, columns - t * TILE_ROWS);
      const float* at = from + s * TILE_INPUTS * stride + t * TILE_ROWS * step;
      if (step == 1)
        tile_of_pairs(at, stride, depth, left, to);
      else
        tile_of_columns(at, step, depth, left, to);
    }
}

inline size_t right_size(int inputs, int columns) { return size_t(tiles(columns, TILE_INPUTS)) * 2 * tiles(inputs, TILE_INPUTS) * TILE; }

// Where a change's tiles begin in the shared memory: A and B as the pass needs them.
struct Places {
  size_t a, b;
};

// Lays out and writes the right tiles of all changes: x A and (x A) B, or with `back` g B^T and (g B^T) A^T.
inline bf16* adapter_tiles(const Changed& y, bool back, int threads, Scratch<bf16>& memory,
                           std::vector<std::vector<Places>>& places) {
  size_t size = 0;
  std::vector<std::pair<int, int>> each;
  for (int r = 0; r < y.count; r++) {
    places.emplace_back();
    for (int i = 0; i < y.readings[r].count; i++) {
      const LowRank& c = y.readings[r].changes[i];
      size_t a = back ? right_size(c.rank, y.in) : right_size(y.in, c.rank);
      size_t b = back ? right_size(c.columns, c.rank) : right_size(c.rank, c.columns);
      places.back().push_back({size, size + a});
      each.push_back({r, i});
      size += a + b;
    }
  }
  bf16* to = memory.of(size);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int unit = 0; unit < int(each.size()) * 2; unit++) {
    auto [r, i] = each[unit / 2];
    const LowRank& c = y.readings[r].changes[i];
    const Places& at = places[r][i];
    if (unit % 2)
      right_tiles(c.a, y.in, 1, c.rank, y.in, !back, to + at.a);
    else
      right_tiles(c.b, c.b_stride, c.b_step, c.rank, c.columns, back, to + at.b);
  }
  return to;
}

// c [32][columns rounded up to 32] of left tiles [2][steps] and right tiles [columns][steps].
inline void block_product(const bf16* left, const bf16* right, int steps, int columns, float* c, bool add) {
  int width = tiles(columns, TILE_INPUTS) * TILE_INPUTS;
  size_t next = size_t(steps) * TILE;
  for (int column = 0; column < columns; column += 32)
    multiply<2, 2>(left, next, right + column / TILE_ROWS * next, next, steps, c + column, width, add);
}

// Left tiles [2 groups][steps] of up to 32 rows.
template <class T>
inline void left_tiles(const T* from, int64_t stride, int rows, int width, bf16* to) {
  int steps = tiles(width, TILE_INPUTS);
  for (int g = 0; g < 2; g++)
    for (int s = 0; s < steps; s++, to += TILE)
      tile_of_rows(from + g * TILE_ROWS * stride + s * TILE_INPUTS, stride, std::max(0, rows - g * TILE_ROWS), width - s * TILE_INPUTS, to);
}

// The blocks of 32 rows of all readings, as (reading, first row of it).
inline std::vector<std::pair<int, int>> blocks_of(const Changed& y) {
  std::vector<std::pair<int, int>> blocks;
  for (int r = 0; r < y.count; r++)
    for (int row = 0; row < y.readings[r].rows; row += 32) blocks.push_back({r, row});
  return blocks;
}

// Memory of a thread for a block: left tiles, and products of up to `columns` columns.
struct BlockMemory {
  Scratch<bf16> narrow;
  Scratch<float> wide;
};

inline int widest(const Changed& y) {
  int most = y.in;
  for (int r = 0; r < y.count; r++)
    for (int i = 0; i < y.readings[r].count; i++)
      most = std::max({most, y.readings[r].changes[i].columns, y.readings[r].changes[i].rank});
  return tiles(most, TILE_INPUTS) * TILE_INPUTS;
}

inline void add_adapters(const Changed& y, int threads) {
  static thread_local Scratch<bf16> shared;
  std::vector<std::vector<Places>> places;
  const bf16* right = adapter_tiles(y, false, threads, shared, places);
  auto blocks = blocks_of(y);
  int most = widest(y);
#pragma omp parallel num_threads(threads)
  {
    static thread_local BlockMemory memory;
    bf16* x = memory.narrow.of(size_t(2) * 32 * most);
    bf16* h = x + 32 * most;
    float* c = memory.wide.of(size_t(32) * most);
    TileRegisters registers;
#pragma omp for schedule(dynamic, 1)
    for (int unit = 0; unit < int(blocks.size()); unit++) {
      auto [r, row] = blocks[unit];
      const Reading& reading = y.readings[r];
      int rows = std::min(32, reading.rows - row), first = 0;
      left_tiles(reading.x + size_t(row) * y.in, y.in, rows, y.in, x);
      for (int i = 0; i < reading.count; i++) {
        const LowRank& change = reading.changes[i];
        int width = tiles(change.rank, TILE_INPUTS) * TILE_INPUTS;
        block_product(x, right + places[r][i].a, tiles(y.in, TILE_INPUTS), change.rank, c, false);
        bf16* kept = reading.reduced + size_t(row) * reading.ranks + first;
        put_rows(c, width, rows, change.rank, kept, reading.ranks, false);
        left_tiles(kept, reading.ranks, rows, change.rank, h);
        block_product(h, right + places[r][i].b, width / TILE_INPUTS, change.columns, c, false);
        put_rows(c, tiles(change.columns, TILE_INPUTS) * TILE_INPUTS, rows, change.columns,
                 y.y + (reading.row + row) * y.width + change.column, y.width, true);
        first += change.rank;
      }
    }
  }
}

// to [rows][columns] = left^T right, sums over `depth` rows of both: of 32 columns of `right` from `column` on.
inline void outer_product(const bf16* turned, int rows, const bf16* pairs, int depth, int column, int columns,
                          float* to, float* c) {
  int steps = tiles(depth, TILE_INPUTS), count = std::min(32, columns - column);
  size_t next = size_t(steps) * TILE;
  for (int g = 0; g < tiles(rows, TILE_ROWS); g++) {
    multiply<1, 2>(turned + g * next, next, pairs, next, steps, c, 32, false);
    put_rows(c, 32, std::min(TILE_ROWS, rows - g * TILE_ROWS), count, to + size_t(g) * TILE_ROWS * columns + column, columns,
             false);
  }
}

// Left tiles [groups of columns][steps of rows] of a matrix's transpose: from [depth][..stride], `columns` of it.
inline void turned_tiles(const bf16* from, int64_t stride, int depth, int columns, bf16* to) {
  for (int g = 0; g < tiles(columns, TILE_ROWS); g++)
    for (int s = 0; s < tiles(depth, TILE_INPUTS); s++, to += TILE)
      tile_of_turned(from + s * TILE_INPUTS * stride + g * TILE_ROWS, stride, columns - g * TILE_ROWS, depth - s * TILE_INPUTS, to);
}

// Right tiles of 32 columns: [2][steps of rows].
inline void pair_tiles(const bf16* from, int64_t stride, int depth, int columns, bf16* to) {
  for (int t = 0; t < 2; t++)
    for (int s = 0; s < tiles(depth, TILE_INPUTS); s++, to += TILE)
      tile_of_pairs(from + s * TILE_INPUTS * stride + t * TILE_ROWS, stride, depth - s * TILE_INPUTS, std::max(0, columns - t * TILE_ROWS), to);
}

// Gradients of A, B and x for y's gradient; `slopes` [readings] are g B^T [rows][ranks], which is written first.
inline void adapters_back(const Changed& y, bf16* const* slopes, int threads) {
  static thread_local Scratch<bf16> shared, turned_memory;
  std::vector<std::vector<Places>> places;
  const bf16* right = adapter_tiles(y, true, threads, shared, places);
  auto blocks = blocks_of(y);
  int most = widest(y), deepest = 0;
  for (int r = 0; r < y.count; r++) deepest = std::max(deepest, tiles(y.readings[r].rows, TILE_INPUTS));
  // Work of the second part: 32 columns of x (change -1) or of one change's outputs.
  struct Unit {
    int reading, change, column, first;
    size_t turned;
  };
  std::vector<Unit> units;
  struct Turn {
    const bf16* from;
    int reading, first, rank;
    size_t to;
  };
  std::vector<Turn> turns;
  size_t size = 0;
  for (int r = 0; r < y.count; r++) {
    const Reading& reading = y.readings[r];
    size_t depth = tiles(reading.rows, TILE_INPUTS), start = size;
    for (int i = 0, first = 0; i < reading.count; first += reading.changes[i++].rank) {
      turns.push_back({slopes[r], r, first, reading.changes[i].rank, size});
      size += tiles(reading.changes[i].rank, TILE_ROWS) * depth * TILE;
    }
    for (int column = 0; column < y.in; column += 32) units.push_back({r, -1, column, 0, start});
    for (int i = 0, first = 0; i < reading.count; first += reading.changes[i++].rank) {
      turns.push_back({reading.reduced, r, first, reading.changes[i].rank, size});
      for (int column = 0; column < reading.changes[i].columns; column += 32)
        units.push_back({r, i, column, first, size});
      size += tiles(reading.changes[i].rank, TILE_ROWS) * depth * TILE;
    }
  }
  bf16* turned = turned_memory.of(size);
#pragma omp parallel num_threads(threads)
  {
    static thread_local BlockMemory memory;
    size_t left_size = size_t(32) * most, ranks = 0;
    for (int r = 0; r < y.count; r++) {
      size_t own = 0;
      for (int i = 0; i < y.readings[r].count; i++) own += tiles(y.readings[r].changes[i].rank, TILE_INPUTS) * TILE_INPUTS;
      ranks = std::max(ranks, own);
    }
    bf16* g = memory.narrow.of(std::max(left_size + 32 * ranks, size_t(2) * deepest * TILE));
    bf16* h = g + left_size;
    float* c = memory.wide.of(size_t(32) * most + 32 * 32);
    TileRegisters registers;
#pragma omp for schedule(dynamic, 1)
    for (int unit = 0; unit < int(blocks.size()); unit++) {
      auto [r, row] = blocks[unit];
      const Reading& reading = y.readings[r];
      int rows = std::min(32, reading.rows - row), first = 0;
      const bf16* gy = y.y + (reading.row + row) * y.width;
      bf16* to = h;
      for (int i = 0; i < reading.count; i++) {
        const LowRank& change = reading.changes[i];
        int width = tiles(change.rank, TILE_INPUTS) * TILE_INPUTS;
        left_tiles(gy + change.column, y.width, rows, change.columns, g);
        block_product(g, right + places[r][i].b, tiles(change.columns, TILE_INPUTS), change.rank, c, false);
        bf16* kept = slopes[r] + size_t(row) * reading.ranks + first;
        put_rows(c, width, rows, change.rank, kept, reading.ranks, false);
        left_tiles(kept, reading.ranks, rows, change.rank, to);
        to += 32 * width;
        first += change.rank;
      }
      if (!reading.to_x) continue;
      const bf16* left = h;
      for (int i = 0; i < reading.count; i++) {
        int steps = tiles(reading.changes[i].rank, TILE_INPUTS);
        block_product(left, right + places[r][i].a, steps, y.in, c, i > 0);
        left += size_t(32) * steps * TILE_INPUTS;
      }
      put_rows(c, tiles(y.in, TILE_INPUTS) * TILE_INPUTS, rows, y.in, reading.to_x + size_t(row) * y.in, y.in, false);
    }
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < int(turns.size()); i++) {
      const Turn& turn = turns[i];
      const Reading& reading = y.readings[turn.reading];
      turned_tiles(turn.from + turn.first, reading.ranks, reading.rows, turn.rank, turned + turn.to);
    }
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < int(units.size()); i++) {
      const Unit& unit = units[i];
      const Reading& reading = y.readings[unit.reading];
      if (unit.change < 0) {
        pair_tiles(reading.x + unit.column, y.in, reading.rows, y.in - unit.column, g);
        size_t at = unit.turned;
        for (int j = 0; j < reading.count; j++) {
          const LowRank& change = reading.changes[j];
          outer_product(turned + at, change.rank, g, reading.rows, unit.column, y.in, change.to_a, c);
          at += size_t(tiles(change.rank, TILE_ROWS)) * tiles(reading.rows, TILE_INPUTS) * TILE;
        }
        continue;
      }
      const LowRank& change = reading.changes[unit.change];
      const bf16* gy = y.y + reading.row * y.width + change.column + unit.column;
      pair_tiles(gy, y.width, reading.rows, change.columns - unit.column, g);
      outer_product(turned + unit.turned, change.rank, g, reading.rows, unit.column, change.columns, change.to_b, c);
    }
  }
}

}  // namespace loraplex
#endif
