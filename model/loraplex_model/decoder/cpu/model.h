// A decoder's weights and settings, its tables, and the memory of its passes; and what reads them by the settings.
//
// The structs up to `Model` are filled in by decoder/native.py through decoder/layout.py, which repeats
// the fields. A setting with its usual value (1 for factors, 0 for caps) is a step that is left out.
#pragma once

#include <memory>

#include "adapters.h"
#include "inputs.h"
#include "rows.h"

namespace loraplex {

// A norm's vectors, of the storage type; `weight` is null where the decoder lacks the norm.
struct NormWeights {
  const void* weight;
  const void* bias;  // or null
};

// Cosines and sines of the positions' angles: a head's first 2 * half numbers are rotated.
struct Rotary {
  const float* cos;  // [positions][half]
  const float* sin;
  int32_t half, reserved;
};

struct Layer {
  NormWeights input_norm, post_norm, q_norm, k_norm, attention_output_norm, mlp_output_norm;
  Matrix qkv, o, gate_up, down;  // gate_up is the projection `up` alone in decoders without gates
  const void* router;  // [experts][hidden], storage type; gate_up and down are stacks of all experts
  void* keys;  // [blocks][kv_heads][block_size][head_dim], storage type
  void* values;
  int32_t window;  // 0 sees all
  int32_t rotary;  // index in Model::rotaries, or -1 without positions
};

// What a norm of queries or keys runs over: every head with the same weight, every head with its own, or
// all heads at once.
enum NormSpan { HEAD_SPAN, EACH_SPAN, ALL_SPAN };

struct Model {
  const Layer* layers;
  const void* embed;  // dense panels if tied to the head, else rows [vocab][hidden]
  NormWeights norm;   // [hidden]
  Matrix lm_head;
  const Rotary* rotaries;
  const float* query_scale;  // [positions], or null
  SlotTable adapters;
  int32_t num_layers, hidden, intermediate, heads, kv_heads, head_dim, block_size, threads;
  float eps, attention_scale;
  float norm_offset;  // added to the weights of all norms
  float embed_scale, residual_scale, logit_scale, logit_softcap, attention_softcap;
  int32_t embed_in_panels, bf16_storage;
  int32_t layer_norm;      // norms subtract the mean
  int32_t qk_span;         // NormSpan
  int32_t activation;      // Activation of the MLP
  int32_t gated, parallel;
  int32_t interleaved;     // rotates pairs (2 i, 2 i + 1)
  int32_t long_rotary;     // takes the place of table 0 in sequences that are long
  int32_t scaled_prompts;  // embed_scale holds for virtual tokens, too
  int32_t vocab;
  int32_t positions;  // of the tables
  int32_t blocks;     // of each layer's keys and values
  int32_t num_experts, experts_per_token, normalised_experts;
  int32_t bf16_products;  // inputs of products are rounded to bfloat16
};

// out = x as one of the model's norms leaves it. `bias` may be null.
template <class W, class B>
inline void norm_row(const Model& m, const float* x, const W* weight, const B* bias, int width, float* out) {
  if (m.layer_norm) return layer_norm(x, weight, bias, m.norm_offset, m.eps, width, out);
  if (m.norm_offset) return rms_norm(x, weight, m.norm_offset, m.eps, width, out);
  rms_norm(x, weight, m.eps, width, out);
}

// Rotates the queries and keys of a row, which lie side by side.
inline void rotate_heads(const Model& m, const Layer& layer, int position, bool is_long, float* q) {
  if (layer.rotary < 0) return;
  const Rotary& table = m.rotaries[is_long && layer.rotary == 0 ? m.long_rotary : layer.rotary];
  const float *cos = table.cos + size_t(position) * table.half, *sin = table.sin + size_t(position) * table.half;
  for (int head = 0; head < m.heads + m.kv_heads; head++) {
    float* x = q + head * m.head_dim;
    m.interleaved ? rotate_interleaved(x, cos, sin, table.half) : rotate(x, cos, sin, table.half);
  }
}

// The embedding of a token, from whichever form the table has.
template <class T>
inline void read_embedding(const Model& m, size_t token, float* x) {
  const T* table = static_cast<const T*>(m.embed);
  if (m.embed_in_panels && m.lm_head.kind == Kind::bf16_packed) {
    for (int i = 0; i < m.hidden; i++) x[i] = load1(table + packed_place(token, i, m.hidden));
  } else if (m.embed_in_panels) {
    const T* at = table + token / PANEL * PANEL * m.hidden + token % PANEL;
    for (int i = 0; i < m.hidden; i++) x[i] = load1(at + size_t(i) * PANEL);
  } else {
    for (int i = 0; i < m.hidden; i++) x[i] = load1(table + token * m.hidden + i);
  }
}

// The intermediate results of a pass, by name of the variable in the papers or of the adapters' step.
// `parallel` is the output of an MLP whose layer still needs that of the attention, in `added`.
struct Workspace {
  Buffer x, normed, qkv, attended, added, parallel, gate_up, gated, gained, h, scores, lora, routed, outputs;
  // The inputs of products once more in bfloat16, if they are multiplied so.
  InputRows normed_inputs, attended_inputs, gated_inputs, head_inputs, routed_inputs, gained_inputs[MAX_PARTS];
};

}  // namespace loraplex
