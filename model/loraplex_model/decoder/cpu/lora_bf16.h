// The adapters' factors on rows of bfloat16: h = A x and y += B h in the library's order of sums (tiles.h).
//
// PAIRS: an element of h is a sum of 16 lanes, lane l of the products of pairs l, l + 16, ... of the inputs.
//   It stays in float32, and y += B h is that of lora.h.
// TILES: A multiplies the exchanged rows as a weight matrix does, without being packed. Each element of h is
//   rounded to bfloat16, and h lies in the form of blocked.h, with the groups of 16 rows of x. For each 32
//   ranks, even + odd is added to y, which are chains over the even and the odd ranks. For many rows AMX
//   computes the chains; for a few, FMAs do so faster, with the same bits.
#pragma once

#include "inputs.h"

namespace loraplex {

constexpr int MOST_COLUMNS = 2048;  // outputs of a unit that adds B h

// The rows [first, end) whose factors are applied; A x of row `origin` is the first in memory.
struct LoraRows {
  int first, end, origin;
};

// Fetches the weights that a thread will probably read next into its cache, a few lines at a time: rows of
// `size` bytes, `stride` bytes apart. The processor's own prefetching begins late in each short matrix.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* first, int rows, size_t stride, size_t size)
      : at_(static_cast<const char*>(first)), end_(at_ + size), rows_(rows), stride_(stride), size_(size) {}
  void fetch(int lines) {
    for (; lines && at_ < end_; lines--, at_ += 64) __builtin_prefetch(at_, 0, 2);
    if (at_ >= end_ && rows_ > 1) {
      rows_--;
      at_ = end_ - size_ + stride_;
      end_ = at_ + size_;
    }
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int rows_ = 0;
  size_t stride_ = 0, size_ = 0;
};

// Whether products with rows of type X compute A x rounded and in tiles.
template <class X>
constexpr bool TILED = sizeof(X) == sizeof(bf16) && ORDER == Order::TILES;

#if LORAPLEX_ORDER == 1

// h[m][r] = scale * x[m] . a[r], for M rows and R ranks.
template <int M, int R>
inline void pair_dots(const bf16* const* x, const bf16* a, int in, float scale, float* h, int h_stride) {
  vf sums[M][R] = {};
  int k = 0;
  auto add = [&](const bf16* ranks, int stride) {
    vu xs[M];
    for (int m = 0; m < M; m++) xs[m] = load_pairs(x[m] + size_t(k) * TILE_ROWS);
    for (int r = 0; r < R; r++) {
      vu pairs = load_pairs(ranks + size_t(r) * stride);
      for (int m = 0; m < M; m++) sums[m][r] = add_pairs(sums[m][r], xs[m], pairs);
    }
  };
  for (; k + TILE_INPUTS <= in; k += TILE_INPUTS) add(a + k, in);
  if (k < in) {
    bf16 last[R][TILE_INPUTS] = {};
    for (int r = 0; r < R; r++) std::copy(a + size_t(r) * in + k, a + size_t(r + 1) * in, last[r]);
    add(last[0], TILE_INPUTS);
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) h[m * h_stride + r] = sum(sums[m][r]) * scale;
}

// h[r] = scale * x . a[r] for a single row: A is read in the order in which it lies in memory.
inline void row_ranks(const bf16* x, int in, const bf16* a, int ranks, float scale, float* h, Ahead& ahead) {
  int whole = in / TILE_INPUTS * TILE_INPUTS;
  for (int r = 0; r < ranks; r++, a += in) {
    vf sums = {};
    for (int k = 0; k < whole; k += TILE_INPUTS) {
      ahead.fetch(1);
      sums = add_pairs(sums, load_pairs(x + size_t(k) * TILE_ROWS), load_pairs(a + k));
    }
    if (whole < in) {
      vu last = {};
      std::memcpy(&last, a + whole, (in - whole) * sizeof(bf16));
      sums = add_pairs(sums, load_pairs(x + size_t(whole) * TILE_ROWS), last);
    }
    h[r] = sum(sums) * scale;
  }
}

template <int M>
inline void pair_ranks(const Inputs& x, int in, int row, const bf16* a, int ranks, float weight, float* h,
                       int h_stride, Ahead& ahead) {
  if constexpr (M == 1) return row_ranks(x.rows.at(row, 0), in, a, ranks, weight, h, ahead);
  const bf16* rows[M];
  for (int m = 0; m < M; m++) rows[m] = x.rows.at(row + m, 0);
  int r = 0;
  for (; r + 4 <= ranks; r += 4) pair_dots<M, 4>(rows, a + size_t(r) * in, in, weight, h + r, h_stride);
  for (; r < ranks; r++) pair_dots<M, 1>(rows, a + size_t(r) * in, in, weight, h + r, h_stride);
}

// Ranks [rank, rank + ranks) of h = weight * A x; `a` points to the first, h to rows of `h_stride` floats.
inline void shrink_factor(const Inputs& x, int in, LoraRows rows, const bf16* a, int rank, int ranks, float weight,
                          float* h, int h_stride, float*, Ahead& ahead) {
  auto at = [&](int row) { return h + size_t(row - rows.origin) * h_stride + rank; };
  int row = rows.first;
  for (; row + 4 <= rows.end; row += 4) pair_ranks<4>(x, in, row, a, ranks, weight, at(row), h_stride, ahead);
  for (; row < rows.end; row++) pair_ranks<1>(x, in, row, a, ranks, weight, at(row), h_stride, ahead);
}

#elif LORAPLEX_ORDER == 2

constexpr int FEW_ROWS = 8;  // with fewer rows than these of a tile, FMAs are faster

// sums[g][16 ranks][16 rows] = a . x for G groups of rows, `x_tile` elements from one tile to the next.
template <int G>
inline void rank_tiles(const bf16* a, size_t a_stride, const bf16* x, int x_tile, size_t x_group, int steps,
                       float* sums, Ahead& ahead) {
#ifdef LORAPLEX_AMX
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int s = 0; s < steps; s++, a += TILE_INPUTS, x += x_tile) {
    ahead.fetch(TILE_ROWS);
    _tile_loadd(4, a, a_stride * sizeof(bf16));
    _tile_loadd(5, x, x_tile / 8);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (G >= 2) {
      _tile_loadd(6, x + x_group, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (G == 4) {
      _tile_loadd(7, x + 2 * x_group, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, x + 3 * x_group, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (G >= 2) _tile_stored(1, sums + 256, 64);
  if constexpr (G == 4) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
#else
  for (int g = 0; g < G; g++)
    tile_product(TILE_ROWS, a, a_stride, TILE_INPUTS, x + g * x_group, x_tile / 16, x_tile, steps,
                 sums + g * 256);
#endif
}

// Rounds the sums of a group and up to 16 ranks, and writes those of its rows to h, with zeros after the
// last rank.
inline void put_hidden(const float* sums, int group, LoraRows rows, int rank, int ranks, float weight,
                       const Blocked& h) {
  vf values[16];
  for (int r = 0; r < 16; r++) values[r] = r < ranks ? load(sums + r * 16) * weight : vf{};
  transpose(values);
  int row = std::max(rows.first, group * TILE_ROWS), end = std::min(rows.end, (group + 1) * TILE_ROWS);
  for (; row < end; row++) store(h.at(row - rows.origin, rank), values[row % TILE_ROWS]);
  written(h.data);
}

// Ranks [rank, rank + ranks) of h = weight * A x; `a` points to the first of them, `rank` is a multiple of
// 32, and `scratch` holds 16 rows of A.
inline void shrink_factor(const Inputs& x, int in, LoraRows rows, const bf16* a, int rank, int ranks, float weight,
                          float* h, int h_stride, float* scratch, Ahead& ahead) {
  Blocked hidden{reinterpret_cast<bf16*>(h), h_stride};
  int steps = Blocked::tiles(in), last = (rows.end - 1) / TILE_ROWS;
  size_t x_group = size_t(steps) * TILE;
  alignas(64) float sums[4 * 256];
  for (int first = 0; first < TILE_INPUTS; first += TILE_ROWS, a += size_t(TILE_ROWS) * in) {
    int count = std::min(ranks - first, TILE_ROWS);
    const bf16* from = a;
    size_t stride = in;
    if (count > 0 && (count < TILE_ROWS || in % TILE_INPUTS)) {  // a tile would reach beyond A
      bf16* copy = reinterpret_cast<bf16*>(scratch);
      stride = size_t(steps) * TILE_INPUTS;
      for (int r = 0; r < count; r++)
        std::fill(std::copy_n(a + size_t(r) * in, in, copy + r * stride), copy + (r + 1) * stride, bf16{0});
      written(copy);
      from = copy;
    }
    for (int group = rows.first / TILE_ROWS, groups; group <= last; group += groups) {
      const bf16* at = x.exchanged + group * x_group;
      groups = last + 1 - group >= 4 ? 4 : last > group ? 2 : 1;
      if (count > 0)
        (groups == 4   ? rank_tiles<4>
         : groups == 2 ? rank_tiles<2>
                       : rank_tiles<1>)(from, stride, at, x.tile(), x_group, steps, sums, ahead);
      for (int g = 0; g < groups; g++)
        put_hidden(sums + g * 256, group + g, rows, rank + first, count, weight, hidden);
    }
  }
}

// Two tiles [16 pairs of ranks][16 columns][2] of B, zeros after the last rank and column.
inline void pair_tiles(const bf16* b, size_t stride, int ranks, int columns, bf16* tiles) {
  bf16 part[2][TILE_INPUTS] = {};
  for (int r = 0; r < TILE_INPUTS; r += 2) {
    vu rows[2] = {};
    for (int i = 0; i < 2 && r + i < ranks; i++) {
      const bf16* row = b + (r + i) * stride;
      if (columns < TILE_INPUTS) std::copy_n(row, columns, part[i]);
      rows[i] = load_pairs(columns < TILE_INPUTS ? part[i] : row);
    }
    vf evens = bit_cast<vf>((rows[0] & 0xffff) | rows[1] << 16);
    vf odds = bit_cast<vf>(rows[0] >> 16 | (rows[1] & 0xffff0000u));
    vf low = interleave_low(evens, odds), high = interleave_high(evens, odds);
    std::memcpy(tiles + r * TILE_ROWS, &low, sizeof low);
    std::memcpy(tiles + TILE + r * TILE_ROWS, &high, sizeof high);
  }
  written(tiles);
}

// y[16][32] += h[16][32] . the two tiles of B.
inline void add_tiles(const bf16* h, const bf16* tiles, float* y, size_t y_stride) {
#ifdef LORAPLEX_AMX
  _tile_loadd(4, h, 64);
  _tile_loadd(0, y, y_stride * sizeof(float));
  _tile_loadd(6, tiles, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(1, y + 16, y_stride * sizeof(float));
  _tile_loadd(7, tiles + TILE, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_stored(0, y, y_stride * sizeof(float));
  _tile_stored(1, y + 16, y_stride * sizeof(float));
#else
  for (int m = 0; m < TILE_ROWS; m++)
    for (int half = 0; half < 2; half++) {
      float* at = y + m * y_stride + half * 16;
      vf evens = {}, odds = {};
      for (int k = 0; k < TILE_INPUTS / 2; k++) {
        vu pair = broadcast_pair(h + m * TILE_INPUTS + 2 * k), w = load_pairs(tiles + half * TILE + k * TILE_INPUTS);
        evens = even(pair) * even(w) + evens;
        odds = odd(pair) * odd(w) + odds;
      }
      store(at, load(at) + (evens + odds));
    }
#endif
}

// y[0:columns] += h . b for up to 32 ranks and whole tiles of columns, as `add_tiles` does. B is read in the order
// in which it lies in memory, two rows at once: the processor's prefetching keeps up with few streams only.
inline void add_row(const float* h, const bf16* b, size_t b_stride, int ranks, int columns, float* y, Ahead& ahead) {
  alignas(64) float chains[2 * MOST_COLUMNS];  // [tile][even or odd ranks][even or odd columns]
  std::fill_n(chains, 2 * columns, 0.0f);
  for (int r = 0; r < ranks; r += 2) {
    int count = std::min(ranks - r, 2);
    for (int c = 0; c < columns; c += TILE_INPUTS) {
      ahead.fetch(count);
      for (int i = 0; i < count; i++) {
        vu pairs = load_pairs(b + (r + i) * b_stride + c);
        float* at = chains + 2 * c + i * TILE_INPUTS;
        store(at, h[r + i] * even(pairs) + load(at));
        store(at + LANES, h[r + i] * odd(pairs) + load(at + LANES));
      }
    }
  }
  for (int c = 0; c < columns; c += TILE_INPUTS) {
    const float* at = chains + 2 * c;
    vf evens = load(at) + load(at + TILE_INPUTS), odds = load(at + LANES) + load(at + TILE_INPUTS + LANES);
    store(y + c, load(y + c) + interleave_low(evens, odds));
    store(y + c + LANES, load(y + c + LANES) + interleave_high(evens, odds));
  }
}

// The same for M rows of y.
template <int M>
inline void add_chains(const float* h, const bf16* b, size_t b_stride, int ranks, float* y, size_t y_stride,
                       Ahead& ahead) {
  vf sums[M][2][2] = {};  // [even or odd ranks][even or odd columns]
  for (int r = 0; r < ranks; r++) {
    ahead.fetch(1);
    vu columns = load_pairs(b + r * b_stride);
    for (int m = 0; m < M; m++) {
      vf(&chain)[2] = sums[m][r % 2];
      chain[0] = h[m * TILE_INPUTS + r] * even(columns) + chain[0];
      chain[1] = h[m * TILE_INPUTS + r] * odd(columns) + chain[1];
    }
  }
  for (int m = 0; m < M; m++) {
    vf evens = sums[m][0][0] + sums[m][1][0], odds = sums[m][0][1] + sums[m][1][1];
    float* at = y + m * y_stride;
    store(at, load(at) + interleave_low(evens, odds));
    store(at + LANES, load(at + LANES) + interleave_high(evens, odds));
  }
}

template <int M>
inline void add_rows(const bf16* hidden, const bf16* b, size_t b_stride, int ranks, int columns, float* y,
                     size_t y_stride, Ahead& ahead) {
  alignas(64) float h[M * TILE_INPUTS];
  for (int i = 0; i < M * TILE_INPUTS; i += LANES) store(h + i, load(hidden + i));
  int c = 0;
  if constexpr (M == 1) {
    c = columns / TILE_INPUTS * TILE_INPUTS;
    add_row(h, b, b_stride, ranks, c, y, ahead);
  }
  for (; c + TILE_INPUTS <= columns; c += TILE_INPUTS)
    add_chains<M>(h, b + c, b_stride, ranks, y + c, y_stride, ahead);
  for (; c < columns; c++)
    for (int m = 0; m < M; m++) {
      float chains[2] = {};
      for (int r = 0; r < ranks; r++)
        chains[r % 2] = multiply_add(h[m * TILE_INPUTS + r], load1(b + r * b_stride + c), chains[r % 2]);
      y[m * y_stride + c] += chains[0] + chains[1];
    }
}

// The same for rows [row, end) of a group, whose A x is the tile `h`. `y` points to row 0.
inline void add_group(const bf16* h, const bf16* tiles, int row, int end, int columns, float* y, size_t y_stride) {
  if (end - row == TILE_ROWS && columns == TILE_INPUTS) return add_tiles(h, tiles, y + row * y_stride, y_stride);
  alignas(64) float copy[TILE_ROWS * TILE_INPUTS] = {};
  for (int m = row; m < end; m++) std::copy_n(y + m * y_stride, columns, copy + m % TILE_ROWS * TILE_INPUTS);
  written(copy);
  add_tiles(h, tiles, copy, TILE_INPUTS);
  for (int m = row; m < end; m++) std::copy_n(copy + m % TILE_ROWS * TILE_INPUTS, columns, y + m * y_stride);
}

// Exchanges rows and columns of a tile's pairs.
inline void exchange_pairs(const bf16* from, bf16* to) {
  vf pairs[16];
  for (int r = 0; r < TILE_ROWS; r++) std::memcpy(&pairs[r], from + r * TILE_INPUTS, sizeof pairs[r]);
  transpose(pairs);
  for (int r = 0; r < TILE_ROWS; r++) std::memcpy(to + r * TILE_INPUTS, &pairs[r], sizeof pairs[r]);
  written(to);
}

// The tile [16 columns][32 ranks] of B.
inline void column_tile(const bf16* b, size_t stride, int ranks, bf16* tile) {
  alignas(64) bf16 tiles[2 * TILE];
  pair_tiles(b, stride, ranks, TILE_ROWS, tiles);
  exchange_pairs(tiles, tile);
}

// sums[16 columns][16 rows] += columns . h, which are tiles [16 columns][32 ranks] and [16 rows][32 ranks], as
// `add_tiles` does.
inline void add_columns(const bf16* columns, const bf16* h, float* sums) {
  alignas(64) bf16 rows[TILE];
  exchange_pairs(h, rows);
#ifdef LORAPLEX_AMX
  written(sums);
  _tile_loadd(0, sums, 64);
  _tile_loadd(4, columns, 64);
  _tile_loadd(6, rows, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_stored(0, sums, 64);
#else
  for (int c = 0; c < TILE_ROWS; c++) {
    vf evens = {}, odds = {};
    for (int k = 0; k < TILE_INPUTS / 2; k++) {
      vu pair = broadcast_pair(columns + c * TILE_INPUTS + 2 * k), row = load_pairs(rows + k * TILE_INPUTS);
      evens = even(pair) * even(row) + evens;
      odds = odd(pair) * odd(row) + odds;
    }
    store(sums + c * 16, load(sums + c * 16) + (evens + odds));
  }
#endif
}

// y[m][0:columns] += B h[m] for the rows of a unit; `y` points to its first.
inline void expand_tiles(LoraRows rows, const bf16* b, size_t b_stride, int ranks, int columns, const float* h,
                         int h_stride, float* y, size_t y_stride, Ahead& ahead) {
  Blocked hidden{const_cast<bf16*>(reinterpret_cast<const bf16*>(h)), h_stride};
  y -= rows.first * y_stride;
  alignas(64) bf16 tiles[2 * TILE];
  for (int rank = 0; rank < ranks; rank += TILE_INPUTS, b += TILE_INPUTS * b_stride) {
    int step = std::min(ranks - rank, TILE_INPUTS);
    // Calls use(row, end) for the rows of each group that has few of them, or many.
    auto each_group = [&](bool few, auto use) {
      for (int row = rows.first, end; row < rows.end; row = end) {
        end = std::min((row / TILE_ROWS + 1) * TILE_ROWS, rows.end);
        if ((end - row < FEW_ROWS) == few) use(row, end);
      }
    };
    bool any = false;
    each_group(false, [&](int, int) { any = true; });
    for (int c = 0; any && c < columns; c += TILE_INPUTS) {
      int width = std::min(columns - c, TILE_INPUTS);
      pair_tiles(b + c, b_stride, step, width, tiles);
      each_group(false, [&](int row, int end) {
        const bf16* tile = hidden.at((row - rows.origin) / TILE_ROWS * TILE_ROWS, rank);
        add_group(tile, tiles, row, end, width, y + c, y_stride);
      });
    }
    each_group(true, [&](int row, int end) {
      auto add = [&](auto kernel, int m) {
        kernel(hidden.at(m - rows.origin, rank), b, b_stride, step, columns, y + m * y_stride, y_stride, ahead);
      };
      for (; row + 4 <= end; row += 4) add(add_rows<4>, row);
      for (; row < end; row++) add(add_rows<1>, row);
    });
  }
}

#endif

}  // namespace loraplex
