// Checks of a pass against the sizes of the model's tables, cache and slots: one comparison for each number
// of the batch, before any of them becomes an address.
#pragma once

#include "model.h"

namespace loraplex {

// What a pass returns. Repeated in decoder/layout.py.
enum Fault { NO_FAULT, NO_MEMORY, BAD_ROWS, BAD_TOKEN, BAD_POSITION, BAD_BLOCK, BAD_SLOT };

inline bool within(int32_t i, int32_t size) { return uint32_t(i) < uint32_t(size); }

// Whether starts [0, ..., total] of `count` ranges are in order.
inline bool in_order(const int32_t* starts, int count, int total) {
  if (starts[0] != 0 || starts[count] != total) return false;
  for (int i = 0; i < count; i++)
    if (starts[i] > starts[i + 1]) return false;
  return true;
}

inline Fault check_sequence(const Model& m, const Batch& b, int s) {
  const SlotTable& table = m.adapters;
  int virtual_tokens = 0;
  for (int i = b.mix_starts[s]; i < b.mix_starts[s + 1]; i++)
    if (!within(b.mix_slots[i], table.slots)) return BAD_SLOT;
  if (b.mix_starts[s] < b.mix_starts[s + 1]) virtual_tokens = table.prompt_counts[b.mix_slots[b.mix_starts[s]]];
  int last = -1;
  for (int t = b.query_starts[s]; t < b.query_starts[s + 1]; t++) {
    if (!within(b.tokens[t], m.vocab) && !within(b.tokens[t] - m.vocab, virtual_tokens)) return BAD_TOKEN;
    if (!within(b.positions[t], m.positions)) return BAD_POSITION;
    last = std::max(last, b.positions[t]);
  }
  int blocks = (last + m.block_size) / m.block_size;
  if (blocks > b.table_width) return BAD_POSITION;
  for (int i = 0; i < blocks; i++)
    if (!within(b.block_tables[size_t(s) * b.table_width + i], m.blocks)) return BAD_BLOCK;
  return NO_FAULT;
}

inline Fault check(const Model& m, const Batch& b) {
  if (b.num_long != 0 && b.num_long != b.num_sequences) return BAD_ROWS;
  if (b.num_tokens < 1 || b.num_sequences < 1 || b.num_logits < 0 || b.num_states < 0) return BAD_ROWS;
  if (!in_order(b.query_starts, b.num_sequences, b.num_tokens)) return BAD_ROWS;
  if (!in_order(b.mix_starts, b.num_sequences, b.num_mixes)) return BAD_SLOT;
  for (int i = 0; i < b.num_logits; i++)
    if (!within(b.logit_rows[i], b.num_tokens)) return BAD_ROWS;
  for (int i = 0; i < b.num_states; i++)
    if (!within(b.state_rows[i], b.num_tokens)) return BAD_ROWS;
  for (int s = 0; s < b.num_sequences; s++)
    if (Fault fault = check_sequence(m, b, s)) return fault;
  return NO_FAULT;
}

}  // namespace loraplex
