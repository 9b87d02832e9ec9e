// The C interface: the pass, the packing of weights, and each kernel on its own for the tests.

#include "bounds.h"
#include "decoder.h"
#include "quantise.h"
#include "sampling/exports.h"
#include "training/interface.h"

using namespace loraplex;

extern "C" {

int loraplex_lanes() { return LANES; }

// The order of sums of products of bfloat16 (tiles.h); 0 if the library has none.
int loraplex_bf16_order() { return LORAPLEX_ORDER; }

Workspace* loraplex_workspace() { return new Workspace; }
void loraplex_free_workspace(Workspace* workspace) { delete workspace; }

// Writes logits [num_logits][vocab] and final states [num_states][hidden]. Returns a Fault; nothing is computed
// unless it is NO_FAULT.
int loraplex_forward(const Model* model, const Batch* batch, Workspace* workspace, float* logits, float* states) {
  if (Fault fault = check(*model, *batch)) return fault;
  try {
#if LORAPLEX_ORDER
    if (model->bf16_products) {
      Pass<bf16, bf16>(*model, *batch, *workspace, logits, states).run();
      return NO_FAULT;
    }
#endif
    if (model->bf16_storage)
      Pass<bf16, float>(*model, *batch, *workspace, logits, states).run();
    else
      Pass<float, float>(*model, *batch, *workspace, logits, states).run();
    return NO_FAULT;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}

// For tests of the threads: passes over two arrays of `width` numbers, of which each phase computes one from
// the other. Phase p has units[p] units, or none and then computes nothing. `failure` makes the first unit of
// phase `at` throw: 1 as an allocation does, 2 by running a pass within the pass. Returns NO_FAULT, NO_MEMORY, or
// -1 for the refusal of the inner pass.
int loraplex_phases(int threads, int passes, int phases, const int32_t* units, int width, uint32_t* numbers,
                    int failure, int at) {
  try {
    for (int i = 0; i < passes; i++) {
      Team team(threads);
      team.pass([&] {
        const uint32_t* from = numbers;
        uint32_t* to = numbers + width;
        for (int phase = 0, p = 0; p < phases; p++) {
          team.run(phase, units[p], [&](int unit) {
            if (p == at && unit == 0 && failure == 1) throw std::bad_alloc();
            if (p == at && unit == 0 && failure == 2) Team(threads).pass([] {});
            int end = int64_t(unit + 1) * width / units[p];
            for (int j = int64_t(unit) * width / units[p]; j < end; j++)
              to[j] = (from[j] ^ from[(7 * j + 3) % width]) * 2654435761u + p;
          });
          if (!units[p]) continue;
          uint32_t* computed = to;
          to = const_cast<uint32_t*>(from);
          from = computed;
        }
      });
    }
    return NO_FAULT;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  } catch (const std::logic_error&) {
    return -1;
  }
}

// Rearranges packed [out][in / 2], two codes per byte with the first in the high half, and absmax
// [out][in / 64] into panels (see matmul.h).
void loraplex_pack_nf4(const uint8_t* packed, const float* absmax, int out, int in, uint32_t* codes,
                       float* scales) {
#pragma omp parallel for
  for (int panel = 0; panel < (out + PANEL - 1) / PANEL; panel++) {
    for (int lane = 0; lane < PANEL; lane++) {
      size_t row = size_t(panel) * PANEL + lane;
      bool real = row < size_t(out);
      for (int i = 0; i < in / 8; i++) {
        uint32_t word = 0x77777777;  // code 7 is zero
        if (real) {
          word = 0;
          const uint8_t* at = packed + (row * in + i * 8) / 2;
          for (int j = 0; j < 4; j++) word |= uint32_t(at[j] >> 4 | (at[j] & 15) << 4) << (8 * j);
        }
        codes[(size_t(panel) * (in / 8) + i) * PANEL + lane] = word;
      }
      for (int i = 0; i < in / BLOCK; i++)
        scales[(size_t(panel) * (in / BLOCK) + i) * PANEL + lane] = real ? absmax[row * (in / BLOCK) + i] : 0;
    }
  }
}

#if LORAPLEX_ORDER

// The same for products of bfloat16 (matmul_bf16.h).
void loraplex_pack_nf4_bf16(const uint8_t* packed, const float* absmax, int out, int in, void* codes, float* scales) {
#pragma omp parallel for
  for (int panel = 0; panel < (out + PANEL - 1) / PANEL; panel++)
    pack_nf4(packed, absmax, out, in, codes, scales, panel);
}

// Packs a dense matrix [out][in]; `packed` has zeros and room for whole tiles of both.
void loraplex_pack_bf16(const bf16* weights, int out, int in, bf16* packed) {
#pragma omp parallel for
  for (int o = 0; o < out; o++)
    for (int i = 0; i < in; i++) packed[packed_place(o, i, in)] = weights[size_t(o) * in + i];
}

// y = x W^T + bias, with x rounded to bfloat16.
void loraplex_matmul_bf16(const Matrix* w, const float* x, int rows, float* y, int threads) {
  InputRows inputs;
  inputs.reserve(rows, w->in);
  Inputs in = inputs.get();
  for (int t = 0; t < rows; t += TILE_ROWS)
    in.put_group(t, std::min(TILE_ROWS, rows - t), 0, w->in, x + size_t(t) * w->in, w->in);
  Tile tile = whole(*w, rows);
  Team team(threads);
  team.pass([&] {
    TileRegisters registers;
    int phase = 0;
    team.run(phase, matmul_units(tile, in), [&](int unit) { matmul_unit(*w, tile, in, y, w->out, unit); });
  });
}

#endif

void loraplex_quantise_nf4(const void* weights, int is_bf16, int64_t count, uint8_t* packed, float* maxima,
                           int threads) {
  if (is_bf16)
    quantise_nf4(static_cast<const bf16*>(weights), count, packed, maxima, threads);
  else
    quantise_nf4(static_cast<const float*>(weights), count, packed, maxima, threads);
}

void loraplex_matmul(const Matrix* w, const float* x, int rows, float* y, int threads) {
  Tile tile = whole(*w, rows);
  Team team(threads);
  team.pass([&] {
    int phase = 0;
    team.run(phase, tile.units(), [&](int unit) { matmul_unit(*w, tile, x, y, w->out, unit); });
  });
}

}  // extern "C"

// The adapters' changes of `rows`, which are of type X.
template <class T, class X, class Rows>
static void lora(const SlotTable& table, const Batch& batch, const Fused& fused, int layer, const Rows& rows, int in,
                 float* y, int out) {
  std::vector<int> sequence(batch.num_tokens);
  for (int s = 0; s < batch.num_sequences; s++)
    std::fill(sequence.begin() + batch.query_starts[s], sequence.begin() + batch.query_starts[s + 1], s);
  Plan plan = make_plan(batch, table, sequence);
  std::vector<float> h(MAX_PARTS * plan.h_size), scratch(lora_scratch(in, plan.max_rank));
  for (const LoraUnit& unit : shrink_units(plan, table, fused, FACTORS, LORA_UNITS<X>))
    shrink<T>(plan, table, fused, layer, unit, rows, in, h.data(), scratch.data());
  for (const LoraUnit& unit : expand_units(plan, fused, FACTORS | GAIN, LORA_UNITS<X>))
    expand<T, X>(plan, table, fused, layer, unit, h.data(), y, out, scratch.data());
  for (int row = 0; row < batch.num_tokens; row += 256)  // as a product's units do
    for (int column = 0; column < out; column += 32)
      expand_joined<T, X>(plan, table, fused, FACTORS | GAIN, layer, row, std::min(row + 256, batch.num_tokens), column,
                          std::min(column + 32, out), h.data(), y, out, scratch.data());
}

template <class T>
static void attention(const float* q, T* keys, T* values, const int32_t* blocks, int block_size, int kv_heads,
                      int head_dim, int heads, int position, int window, Scoring scoring, float* out) {
  Pages<T> k{keys, blocks, block_size, kv_heads, head_dim}, v{values, blocks, block_size, kv_heads, head_dim};
  std::vector<float> scratch(HEADS_AT_ONCE * size_t(position + 1));
  int group = heads / kv_heads;
  for (int head = 0; head < kv_heads; head++)
    attend(q + head * group * head_dim, k, v, head, group, position, window, scoring, scratch.data(),
           out + head * group * head_dim);
}

extern "C" {

void loraplex_lora(const SlotTable* table, const Batch* batch, const Fused* fused, int layer, int is_bf16,
                   const float* x, int in, float* y, int out) {
  if (is_bf16)
    lora<bf16, float>(*table, *batch, *fused, layer, x, in, y, out);
  else
    lora<float, float>(*table, *batch, *fused, layer, x, in, y, out);
}

#if LORAPLEX_ORDER

// The same for adapters in bfloat16, with x rounded to bfloat16.
void loraplex_lora_bf16(const SlotTable* table, const Batch* batch, const Fused* fused, int layer, const float* x,
                        int in, float* y, int out) {
  TileRegisters registers;
  InputRows inputs;
  inputs.reserve(batch->num_tokens, in);
  for (int t = 0; t < batch->num_tokens; t++) inputs.put(t, 0, in, x + size_t(t) * in);
  Inputs rows = inputs.get();
  lora<bf16, bf16>(*table, *batch, *fused, layer, rows, in, y, out);
}

#endif

void loraplex_attention(const float* q, void* keys, void* values, const int32_t* blocks, int is_bf16,
                        int block_size, int kv_heads, int head_dim, int heads, int position, int window,
                        float scale, float softcap, float* out) {
  if (is_bf16)
    attention(q, static_cast<bf16*>(keys), static_cast<bf16*>(values), blocks, block_size, kv_heads, head_dim,
              heads, position, window, {scale, softcap}, out);
  else
    attention(q, static_cast<float*>(keys), static_cast<float*>(values), blocks, block_size, kv_heads,
              head_dim, heads, position, window, {scale, softcap}, out);
}

#if LORAPLEX_ORDER

// Attention in products of bfloat16 of `count` queries of one sequence, q and out [count][heads][head_dim];
// keys and values as in attention_bf16.h.
void loraplex_attention_bf16(const float* q, bf16* keys, bf16* values, const int32_t* blocks, int block_size,
                             int kv_heads, int head_dim, int heads, const int32_t* positions, int count, int window,
                             float scale, float softcap, float* out) {
  TileRegisters registers;
  PairedPages pages{keys, values, blocks, block_size, kv_heads, head_dim};
  std::vector<float> scratch(attention_scratch(head_dim, block_size));
  int group = heads / kv_heads, rows = count * group;
  size_t stride = size_t(heads) * head_dim;
  for (int head = 0; head < kv_heads; head++)
    for (int first = 0; first < rows; first += QUERY_ROWS) {
      size_t column = size_t(head) * group * head_dim;
      QueryRows queries{q + column, stride, positions, group, first, std::min(QUERY_ROWS, rows - first)};
      attend_rows(queries, pages, head, window, {scale, softcap}, scratch.data(), [&](int r) {
        return out + (first + r) / group * stride + column + (first + r) % group * head_dim;
      });
    }
}

#endif

void loraplex_add_rms_norm(float* x, const float* y, const void* weight, int is_bf16, float eps, int rows,
                           int width, float* out) {
  for (int m = 0; m < rows; m++, x += width, y += width, out += width) {
    add(x, y, width);
    if (is_bf16)
      rms_norm(x, static_cast<const bf16*>(weight), eps, width, out);
    else
      rms_norm(x, static_cast<const float*>(weight), eps, width, out);
  }
}

// `bias` may be null; with `is_layer` the mean is subtracted.
void loraplex_norm(const float* x, const void* weight, const void* bias, int is_bf16, int is_layer, float offset,
                   float eps, int rows, int width, float* out) {
  auto norm = [&](auto* w, auto* b) {
    for (int m = 0; m < rows; m++, x += width, out += width) {
      if (is_layer)
        layer_norm(x, w, b, offset, eps, width, out);
      else
        rms_norm(x, w, offset, eps, width, out);
    }
  };
  if (is_bf16)
    norm(static_cast<const bf16*>(weight), static_cast<const bf16*>(bias));
  else
    norm(static_cast<const float*>(weight), static_cast<const float*>(bias));
}

void loraplex_rotate(float* x, const float* cos, const float* sin, int interleaved, int rows, int half) {
  for (int m = 0; m < rows; m++, x += 2 * half, cos += half, sin += half)
    interleaved ? rotate_interleaved(x, cos, sin, half) : rotate(x, cos, sin, half);
}

// Activations by their numbers; `up` is null without gates.
void loraplex_activate(const float* gate, const float* up, int activation, int count, float* out) {
  activate_row(gate, up, activation, count, out);
}

void loraplex_cap(float* x, int count, float scale, float cap) { cap_row(x, count, scale, cap); }

// Training: rows in parallel, `out` [rows][width] (of `silu_mul_backward`: [rows][2 * width]).
void loraplex_to_bf16(const float* x, int count, void* out) { put(x, count, static_cast<bf16*>(out)); }

}  // extern "C"
