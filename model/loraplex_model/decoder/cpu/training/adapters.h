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
  bf16* to_x;  // gradient [rows][in], or null; with `adds` it is added to what is there
  const LowRank* changes;
  int row, rows, count, ranks, adds;
};

// A product that is changed: y [..][width], or in the derivative its gradient.
struct Changed {
  bf16* y;
  int64_t width;
  int in;
  const Reading* readings;
  int count;
};

// Right tiles of a matrix [rows][columns] with any strides, as inputs x columns: [tiles of columns][steps].
// With `turned` its rows are the columns.
inline void factor_tiles(const float* from, int64_t stride, int64_t step, int rows, int columns, bool turned,
                         bf16* to) {
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

inline size_t right_size(int inputs, int columns) {
  return size_t(tiles(columns, TILE_INPUTS)) * 2 * tiles(inputs, TILE_INPUTS) * TILE;
}

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
      factor_tiles(c.a, y.in, 1, c.rank, y.in, !back, to + at.a);
    else
      factor_tiles(c.b, c.b_stride, c.b_step, c.rank, c.columns, back, to + at.b);
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
inline void block_lefts(const T* from, int64_t stride, int rows, int width, bf16* to) {
  int steps = tiles(width, TILE_INPUTS);
  for (int g = 0; g < 2; g++)
    for (int s = 0; s < steps; s++, to += TILE)
      tile_of_rows(from + g * TILE_ROWS * stride + s * TILE_INPUTS, stride, std::max(0, rows - g * TILE_ROWS),
                   width - s * TILE_INPUTS, to);
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
  Units units;
#pragma omp parallel num_threads(threads)
  {
    static thread_local BlockMemory memory;
    bf16* x = nullptr;
    float* c = nullptr;
    units.run([&] {
      x = memory.narrow.of(size_t(2) * 32 * most);
      c = memory.wide.of(size_t(32) * most);
    });
    bf16* h = x + 32 * most;
    TileRegisters registers;
#pragma omp for schedule(dynamic, 1)
    for (int unit = 0; unit < int(blocks.size()); unit++) {
      if (!c) continue;
      auto [r, row] = blocks[unit];
      const Reading& reading = y.readings[r];
      int rows = std::min(32, reading.rows - row), first = 0;
      block_lefts(reading.x + size_t(row) * y.in, y.in, rows, y.in, x);
      for (int i = 0; i < reading.count; i++) {
        const LowRank& change = reading.changes[i];
        int width = tiles(change.rank, TILE_INPUTS) * TILE_INPUTS;
        block_product(x, right + places[r][i].a, tiles(y.in, TILE_INPUTS), change.rank, c, false);
        bf16* kept = reading.reduced + size_t(row) * reading.ranks + first;
        put_rows(c, width, rows, change.rank, kept, reading.ranks, false);
        block_lefts(kept, reading.ranks, rows, change.rank, h);
        const bf16* b = right + places[r][i].b;
        size_t next = size_t(width) / TILE_INPUTS * TILE;
        bf16* to = y.y + (reading.row + row) * y.width + change.column;
        for (int column = 0; column < change.columns; column += 32) {  // the products stay in the first-level cache
          multiply<2, 2>(h, next, b + column / TILE_ROWS * next, next, width / TILE_INPUTS, c, 32, false);
          put_rows(c, 32, rows, std::min(32, change.columns - column), to + column, y.width, true);
        }
        first += change.rank;
      }
    }
  }
  units.check();
}

// sums [rows of 16][width] += left^T right, for up to 32 rows of both: the block's `rows` columns of `left` as
// tiles, and the tiles of pairs of `columns` of `right`.
inline void outer_product(const bf16* left, int64_t stride, int depth, int rows, const bf16* pairs, int columns,
                          float* sums, bool add) {
  alignas(64) bf16 turned[TILE];
  int width = tiles(columns, TILE_INPUTS) * TILE_INPUTS;
  for (int row = 0; row < rows; row += TILE_ROWS) {
    tile_of_turned(left + row, stride, rows - row, depth, turned);
    for (int column = 0; column < columns; column += 32)
      multiply<1, 2>(turned, 0, pairs + column / TILE_ROWS * TILE, TILE, 1, sums + size_t(row) * width + column, width,
                     add);
  }
}

// Right tiles of up to 32 rows: [tiles of 16 columns], an even number.
inline void block_pairs(const bf16* from, int64_t stride, int depth, int columns, bf16* to) {
  for (int t = 0; t < tiles(columns, TILE_INPUTS) * 2; t++)
    tile_of_pairs(from + t * TILE_ROWS, stride, depth, std::max(0, columns - t * TILE_ROWS), to + t * TILE);
}

// Sums of a matrix [rows][columns] with room for whole tiles.
inline size_t sums_size(int rows, int columns) {
  return size_t(tiles(rows, TILE_ROWS)) * TILE_ROWS * tiles(columns, TILE_INPUTS) * TILE_INPUTS;
}

// Rows of a reading whose gradients of A and B are summed by one thread. It depends on the reading alone, and
// with it the order of all sums.
inline int part_rows(const Reading& reading) {
  return std::clamp(tiles(tiles(reading.rows, TILE_ROWS), TILE_INPUTS) * TILE_INPUTS, 32, 256);
}

// The derivative of `add_adapters`, in two parts: blocks of rows, with sums of A's and B's gradients for each part of
// the rows; then the sums of the parts.
class AdaptersBack {
 public:
  AdaptersBack(const Changed& y, int threads) : y_(y), threads_(threads), most_(widest(y)) {
    static thread_local Scratch<bf16> memory;
    right_ = adapter_tiles(y, true, threads, memory, places_);
    for (int r = 0; r < y.count; r++) {
      const Reading& reading = y.readings[r];
      size_t size = 0;
      int ranks = 0;
      for (int i = 0; i < reading.count; i++) {
        const LowRank& change = reading.changes[i];
        results_.push_back({r, size, change.rank, y.in, change.to_a});
        size += sums_size(change.rank, y.in);
        results_.push_back({r, size, change.rank, change.columns, change.to_b});
        size += sums_size(change.rank, change.columns);
        ranks += tiles(change.rank, TILE_INPUTS) * TILE_INPUTS;
      }
      ranks_ = std::max(ranks_, ranks);
      firsts_.push_back(units_.size());
      for (int row = 0; row < reading.rows; row += part_rows(reading)) {
        units_.push_back({r, row, size_});
        size_ += size;
      }
    }
    firsts_.push_back(units_.size());
  }

  void run() {
    static thread_local Scratch<float> kept;
    float* sums = kept.of(size_);
    Units units;
#pragma omp parallel num_threads(threads_)
    {
      static thread_local Scratch<bf16> narrow;
      static thread_local Scratch<float> wide;
      Memory memory{};
      units.run([&] {
        memory.left = narrow.of(size_t(96) * most_ + size_t(64) * ranks_);
        memory.c = wide.of(size_t(32) * most_);
      });
      memory.pairs = memory.left + size_t(32) * most_;
      memory.x = memory.pairs + size_t(32) * most_;
      memory.slopes = memory.x + size_t(32) * most_;
      memory.plain = memory.slopes + size_t(32) * ranks_;
      TileRegisters registers;
#pragma omp for schedule(dynamic, 1)
      for (int unit = 0; unit < int(units_.size()); unit++) {
        if (!memory.c) continue;
        const Unit& part = units_[unit];
        int end = std::min(y_.readings[part.reading].rows, part.row + part_rows(y_.readings[part.reading]));
        for (int row = part.row; row < end; row += 32) block(part, row, std::min(32, end - row), sums, memory);
      }
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < int(results_.size()); i++) units.run([&] { add_parts(results_[i], sums); });
    }
    units.check();
  }

 private:
  struct Unit {
    int reading, row;
    size_t sums;  // of A and of B, change by change
  };
  // A gradient [rows][columns], whose sums lie at `at` within those of each unit of the reading.
  struct Sum {
    int reading;
    size_t at;
    int rows, columns;
    float* to;
  };
  // A thread's: left tiles of gradients, right tiles of them and of x, left tiles of slopes and the slopes themselves.
  struct Memory {
    bf16 *left, *pairs, *x, *slopes, *plain;
    float* c;
  };

  void block(const Unit& part, int row, int rows, float* sums, const Memory& m) const {
    const Reading& reading = y_.readings[part.reading];
    const bf16* gradient = y_.y + (reading.row + row) * y_.width;
    float* into = sums + part.sums;
    bool add = row > part.row;
    bf16* slopes = m.slopes;
    block_pairs(reading.x + size_t(row) * y_.in, y_.in, rows, y_.in, m.x);
    for (int i = 0, first = 0; i < reading.count; first += reading.changes[i++].rank) {
      const LowRank& change = reading.changes[i];
      const bf16* own = gradient + change.column;
      int width = tiles(change.rank, TILE_INPUTS) * TILE_INPUTS;
      block_lefts(own, y_.width, rows, change.columns, m.left);
      block_product(m.left, right_ + places_[part.reading][i].b, tiles(change.columns, TILE_INPUTS), change.rank, m.c,
                    false);
      put_rows(m.c, width, rows, change.rank, m.plain, width, false);
      block_lefts(m.plain, width, rows, change.rank, slopes);
      slopes += size_t(32) * width;
      outer_product(m.plain, width, rows, change.rank, m.x, y_.in, into, add);
      into += sums_size(change.rank, y_.in);
      block_pairs(own, y_.width, rows, change.columns, m.pairs);
      outer_product(reading.reduced + size_t(row) * reading.ranks + first, reading.ranks, rows, change.rank, m.pairs,
                    change.columns, into, add);
      into += sums_size(change.rank, change.columns);
    }
    if (reading.to_x) to_inputs(part, row, rows, m);
  }

  void to_inputs(const Unit& part, int row, int rows, const Memory& m) const {
    const Reading& reading = y_.readings[part.reading];
    const bf16* left = m.slopes;
    for (int i = 0; i < reading.count; i++) {
      int steps = tiles(reading.changes[i].rank, TILE_INPUTS);
      block_product(left, right_ + places_[part.reading][i].a, steps, y_.in, m.c, i > 0);
      left += size_t(32) * steps * TILE_INPUTS;
    }
    put_rows(m.c, tiles(y_.in, TILE_INPUTS) * TILE_INPUTS, rows, y_.in, reading.to_x + size_t(row) * y_.in, y_.in,
             reading.adds);
  }

  void add_parts(const Sum& sum, const float* sums) const {
    size_t width = tiles(sum.columns, TILE_INPUTS) * TILE_INPUTS, first = firsts_[sum.reading];
    for (size_t unit = first; unit < firsts_[sum.reading + 1]; unit++)
      for (int row = 0; row < sum.rows; row++)
        put_rows(sums + units_[unit].sums + sum.at + row * width, 0, 1, sum.columns, sum.to + size_t(row) * sum.columns,
                 0, unit > first);
  }

  const Changed& y_;
  int threads_, most_, ranks_ = 0;
  size_t size_ = 0;
  std::vector<std::vector<Places>> places_;
  std::vector<Unit> units_;
  std::vector<size_t> firsts_;
  std::vector<Sum> results_;
  const bf16* right_;
};

}  // namespace loraplex
#endif
