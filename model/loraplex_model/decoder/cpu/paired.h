// The KV cache in the form in which products of bfloat16 read keys and values.
#pragma once

#include <algorithm>

#include "rows.h"
#include "tiles.h"

namespace loraplex {

// Keys and values of one layer in the form of the second factor of a product. A block of one head is
// keys [head_dim / 2][block_size][2] and values [block_size / 2][head_dim][2]. Head sizes that are odd are
// rounded up for keys; block_size is even.
struct PairedPages {
  bf16 *keys, *values;
  const int32_t* blocks;  // the sequence's block table
  int block_size, kv_heads, head_dim;

  int pairs() const { return (head_dim + 1) / 2; }
  size_t place(int position, int head) const {
    return size_t(blocks[unsigned(position) / block_size]) * kv_heads + head;
  }
  // Dimensions 0 and 1 of the key at a position; the next pair is 2 * block_size elements further.
  bf16* key(int position, int head) const {
    return keys + (place(position, head) * pairs() * block_size + unsigned(position) % block_size) * 2;
  }
  // Dimension 0 of the values at an even position and the next one; the next dimension is 2 elements further.
  bf16* value(int position, int head) const {
    return values + (place(position, head) * (block_size / 2) + unsigned(position) % block_size / 2) * head_dim * 2;
  }

  // Writes the key and the value at a position.
  void put(int position, int head, const float* k, const float* v) const {
    bf16 part[TILE_INPUTS];
    bf16 *to_key = key(position, head), *to_value = value(position & ~1, head) + (position & 1);
    for (int i = 0; i < head_dim; i += TILE_INPUTS) {
      int count = std::min(TILE_INPUTS, head_dim - i);
      part[count - 1 + count % 2] = {0};  // beside the last dimension, if their number is odd
      loraplex::put(k + i, count, part);
      for (int n = 0; n < count; n += 2, to_key += 2 * block_size) std::memcpy(to_key, part + n, 2 * sizeof(bf16));
      loraplex::put(v + i, count, part);
      for (int n = 0; n < count; n++, to_value += 2) *to_value = part[n];
    }
  }
};

// Rows [first, first + count) of a run of queries. Row i is head i % group of query i / group.
struct QueryRows {
  const float* q;            // the group's first head in the run's first query
  size_t stride;             // from a query to the next
  const int32_t* positions;  // of the run's queries
  int group, first, count;
};

}  // namespace loraplex
