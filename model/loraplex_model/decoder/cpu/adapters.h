// The resident adapters as the kernels see them, and the adapters of each row of a pass.
//
// Numbers and structs up to `Batch` are defined in Python, too (model/config.py, adapters/delta.py,
// adapters/table.py, decoder/layout.py); tests/kernels/test_layout.py compares the two.
#pragma once

#include <algorithm>
#include <vector>

#include "matmul.h"

namespace loraplex {

// The places of a layer that an adapter can change, and those outside the layers, which follow the last
// layer in the table.
enum LayerSite {
  Q_PROJ,
  K_PROJ,
  V_PROJ,
  O_PROJ,
  GATE_PROJ,
  UP_PROJ,
  DOWN_PROJ,
  ATTENTION_BOTTLENECK,
  MLP_BOTTLENECK,
  INPUT_LAYERNORM,
  POST_ATTENTION_LAYERNORM,
  Q_NORM,
  K_NORM,
  ATTENTION_OUTPUT_NORM,
  MLP_OUTPUT_NORM,
  LAYER_SITES
};
enum ModelSite { EMBED_TOKENS, LM_HEAD, FINAL_NORM, MODEL_SITES };

// The fused matrices of a layer, in the order of SlotTable::merged.
constexpr int MAX_PARTS = 3;  // projections of a fused matrix: q, k and v
enum FusedMatrix { QKV, O, GATE_UP, DOWN, FUSED_MATRICES };

// The sorts of changes that an adapter makes. Steps that no row of a pass uses are skipped.
enum Use { FACTORS = 1, GAIN = 2, IN_GAIN = 4, NORM = 8, BOTTLENECK = 16, EMBEDDING = 32, HEAD = 64 };

// The change of one adapter at one site; adapters/delta.py says which fields a site has. Absent parts are
// null. a, b and rows are of the storage type.
struct Entry {
  const void* a;
  const void* b;
  const void* rows;
  const float* gain;
  const float* in_gain;
  const float* bias;
  const float* hidden_bias;
  const int32_t* token_ids;
  int32_t rank, count, activation, reads;
};

struct SlotTable {
  const Entry* entries;         // [slots][layers * LAYER_SITES + MODEL_SITES]
  const int32_t* max_ranks;     // [slots], the largest rank at a projection or the head
  const int32_t* uses;          // [slots], bits of Use
  const void* const* prompts;   // [slots], embeddings of virtual tokens
  const Matrix* const* merged;  // [slots][layers][FUSED_MATRICES], or null
  const int32_t* prompt_counts; // [slots], number of virtual tokens that have embeddings
  int32_t layers;
  int32_t slots;

  // The entry of a layer's site; sites outside the layers are at (layers, ModelSite).
  const Entry& at(int slot, int layer, int site) const {
    return entries[size_t(slot) * (layers * LAYER_SITES + MODEL_SITES) + layer * LAYER_SITES + site];
  }
  const Matrix* dense(int slot, int layer, int fused) const {
    return merged[(size_t(slot) * layers + layer) * FUSED_MATRICES + fused];
  }
  bool is_merged(int slot) const {
    int count = layers * FUSED_MATRICES;
    for (int i = 0; i < count; i++)
      if (merged[size_t(slot) * count + i]) return true;
    return false;
  }
};

// See loraplex_model.base.batch.ForwardBatch.
struct Batch {
  const int32_t* tokens;
  const int32_t* positions;
  const int32_t* query_starts;
  const int32_t* block_tables;
  const int32_t* mix_starts;
  const int32_t* mix_slots;
  const float* mix_weights;
  const int32_t* logit_rows;
  const int32_t* state_rows;
  const uint8_t* is_long;  // [num_long]
  int32_t num_tokens, num_sequences, table_width, num_logits, num_states;
  int32_t num_mixes;
  int32_t num_long;  // 0 or num_sequences
};

// An adapter with its weight in the mix of a segment.
struct Term {
  int slot;
  float weight;
  size_t h;  // offset of this term's A x for each projection of a fused matrix
};

// Adjacent rows with the same mix.
struct Segment {
  int first, end;            // rows
  int term_begin, term_end;  // into Plan::terms
  int uses;                  // of all its terms, without those that dense matrices contain
  int merged;                // the slot whose dense matrices these rows use, or -1

  // The row at which its A x begins in memory: its first or, so that tiles of A x hold the rows of whole tiles
  // of x, one before that.
  int origin() const { return first / 16 * 16; }
};

// Floats of A x for so many rows and ranks: as rows of floats, or rounded to bfloat16 and padded to tiles of
// 16 rows and 32 ranks.
inline size_t hidden_size(int rows, int rank) {
  return std::max(size_t(rows) * rank, size_t(rows + 15) / 16 * 16 * (size_t(rank + 31) / 32 * 32) / 2);
}

// The segments of a pass. Rows of the bare base are in none.
struct Plan {
  std::vector<Term> terms;
  std::vector<Segment> segments;
  std::vector<int> segment_of;  // by row; -1 for the base
  size_t h_size = 0;            // floats of A x for one projection of a fused matrix
  int uses = 0;                 // of all segments
  int max_rank = 0;

  const Segment* segment(int row) const {
    return segment_of[row] < 0 ? nullptr : &segments[segment_of[row]];
  }
};

inline bool same_mix(const Batch& b, int s, int t) {
  int count = b.mix_starts[s + 1] - b.mix_starts[s];
  if (b.mix_starts[t + 1] - b.mix_starts[t] != count) return false;
  for (int i = 0; i < count; i++)
    if (b.mix_slots[b.mix_starts[s] + i] != b.mix_slots[b.mix_starts[t] + i] ||
        b.mix_weights[b.mix_starts[s] + i] != b.mix_weights[b.mix_starts[t] + i])
      return false;
  return true;
}

// The sequence of each row.
inline std::vector<int> sequences(const Batch& b) {
  std::vector<int> sequence(b.num_tokens);
  for (int s = 0; s < b.num_sequences; s++)
    std::fill(sequence.begin() + b.query_starts[s], sequence.begin() + b.query_starts[s + 1], s);
  return sequence;
}

// The sequence of each row whose logits are wanted.
inline std::vector<int> logit_sequences(const Batch& b, const std::vector<int>& sequence) {
  std::vector<int> wanted(b.num_logits);
  for (int i = 0; i < b.num_logits; i++) wanted[i] = sequence[b.logit_rows[i]];
  return wanted;
}

// Groups adjacent rows with equal mixes into segments; `sequence` is each row's sequence.
inline Plan make_plan(const Batch& b, const SlotTable& table, const std::vector<int>& sequence) {
  constexpr int IN_PROJECTIONS = FACTORS | GAIN | IN_GAIN;  // what dense matrices contain
  Plan plan;
  plan.segment_of.assign(sequence.size(), -1);
  for (int row = 0; row < int(sequence.size()); row++) {
    int s = sequence[row], begin = b.mix_starts[s], end = b.mix_starts[s + 1];
    if (begin == end) continue;
    if (row > 0 && plan.segment_of[row - 1] >= 0 && same_mix(b, s, sequence[row - 1])) {
      plan.segment_of[row] = plan.segment_of[row - 1];
      plan.segments.back().end = row + 1;
      continue;
    }
    Segment segment = {row, row + 1, int(plan.terms.size()), 0, 0, -1};
    for (int i = begin; i < end; i++) {
      plan.terms.push_back({b.mix_slots[i], b.mix_weights[i], 0});
      segment.uses |= table.uses[b.mix_slots[i]];
    }
    segment.term_end = plan.terms.size();
    if (end - begin == 1 && b.mix_weights[begin] == 1.0f && table.is_merged(b.mix_slots[begin])) {
      segment.merged = b.mix_slots[begin];
      segment.uses &= ~IN_PROJECTIONS;
    }
    plan.segment_of[row] = plan.segments.size();
    plan.segments.push_back(segment);
  }
  for (const Segment& segment : plan.segments) {
    plan.uses |= segment.uses;
    for (int t = segment.term_begin; t < segment.term_end; t++) {
      int rank = table.max_ranks[plan.terms[t].slot];
      plan.terms[t].h = plan.h_size;
      plan.h_size += hidden_size(segment.end - segment.origin(), rank);
      plan.max_rank = std::max(plan.max_rank, rank);
    }
  }
  return plan;
}

// out = 1 + sum w (gain - 1) over a segment's terms, for `width` channels. `pick` returns the gains of a
// slot, or null. Returns false, with `out` unchanged, if no term has gains.
template <class Pick>
inline bool blend_gains(const Plan& plan, const Segment& segment, int width, Pick pick, float* out) {
  bool any = false;
  for (int t = segment.term_begin; t < segment.term_end; t++) {
    const float* gain = pick(plan.terms[t].slot);
    if (!gain) continue;
    float weight = plan.terms[t].weight;
    if (!any && weight == 1.0f) {
      std::copy_n(gain, width, out);
    } else {
      if (!any) std::fill_n(out, width, 1.0f);
      for (int i = 0; i < width; i++) out[i] = multiply_add(weight, gain[i] - 1.0f, out[i]);
    }
    any = true;
  }
  return any;
}

// The largest width of a bottleneck, or rank at the embeddings, among the adapters of a pass.
inline int widest_site(const Plan& plan, const SlotTable& table) {
  int widest = 0;
  if (!(plan.uses & (BOTTLENECK | EMBEDDING))) return widest;
  for (const Term& term : plan.terms) {
    widest = std::max(widest, table.at(term.slot, table.layers, EMBED_TOKENS).rank);
    for (int l = 0; l < table.layers; l++)
      for (int site : {ATTENTION_BOTTLENECK, MLP_BOTTLENECK})
        widest = std::max(widest, table.at(term.slot, l, site).rank);
  }
  return widest;
}

}  // namespace loraplex
