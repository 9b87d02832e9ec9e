// Rows of bfloat16 in the form in which products read them.
//
// Element (t, i) lies in tile (t / 16, i / 32), which is 16 rows of 32 elements and contiguous. So the rows
// of a tile never compete for the same places of a cache, however wide the rows are. Each row is padded
// with zeros to whole tiles; rows after the last one of a group of 16 are not initialised.
#pragma once

#include <algorithm>

#include "tiles.h"

namespace loraplex {

struct Blocked {
  bf16* data;
  int width;  // elements of a row

  static int tiles(int width) { return (width + TILE_INPUTS - 1) / TILE_INPUTS; }
  static size_t size(int rows, int width) {
    return size_t((rows + TILE_ROWS - 1) / TILE_ROWS) * tiles(width) * TILE;
  }

  // The first tile of the group of row t.
  bf16* group(int t) const { return data + size_t(t / TILE_ROWS) * tiles(width) * TILE; }

  // Element i of row t; those up to the next multiple of 32 follow it.
  bf16* at(int t, int i) const {
    return group(t) + size_t(i / TILE_INPUTS) * TILE + t % TILE_ROWS * TILE_INPUTS + i % TILE_INPUTS;
  }

  // Writes elements [first, first + count) of row t. The padding is written with the last of them.
  void put(int t, int first, int count, const float* x) const {
    int i = first, end = first + count;
    for (; i < end && i % LANES; i++) store1(at(t, i), x[i - first]);
    for (; i + LANES <= end; i += LANES) store(at(t, i), load(x + i - first));
    for (; i < end; i++) store1(at(t, i), x[i - first]);
    if (end == width)
      for (; i < tiles(width) * TILE_INPUTS; i++) *at(t, i) = {0};
  }

  // Reads elements [first, first + count) of row t.
  void get(int t, int first, int count, float* x) const {
    int i = first, end = first + count;
    for (; i < end && i % LANES; i++) x[i - first] = load1(at(t, i));
    for (; i + LANES <= end; i += LANES) store(x + i - first, load(at(t, i)));
    for (; i < end; i++) x[i - first] = load1(at(t, i));
  }
};

// The place of weight (o, i) in a packed dense matrix.
inline size_t packed_place(size_t o, int i, int in) {
  size_t tile = (o / TILE_ROWS * Blocked::tiles(in) + i / TILE_INPUTS) * TILE;
  int within = i % TILE_INPUTS;
  if (ORDER == Order::PAIRS) return tile + within / 2 * 2 * TILE_ROWS + o % TILE_ROWS * 2 + within % 2;
  return tile + o % TILE_ROWS * TILE_INPUTS + within;
}

}  // namespace loraplex
