// The gated unit of an MLP in one product: activation(gate . x) * (up . x), rounded to bfloat16 and written as
// the next product reads it. The adapters' changes of gate and up come in between, for TILES if all of them are
// made where the product's unit has just computed its sums. The arithmetic is that of the product, of lora.h and of
// `activate_row`, so a row's bits are the same as in other passes.
#pragma once

#include "activations.h"
#include "product.h"

#if LORAPLEX_ORDER

namespace loraplex {

inline vf activated(vf x, int activation) {
  switch (activation) {
    case GELU: return gelu(x);
    case GELU_TANH: return gelu_tanh(x);
    default: return silu(x);
  }
}

// Whether the matrix of gate and up, one after the other, has the form that `gated_unit` needs.
inline bool gates_fit(const Matrix& w) { return w.kind == Kind::nf4_packed && w.out % (2 * PANEL) == 0; }

// Units for rows [0, rows): a panel of gate and that of up, for a number of groups of rows.
inline int gated_units(const Matrix& w, int rows) {
  Tile gate{0, rows, 0, w.out / 2};
  return w.out / 2 / PANEL * Part::row_chunks(gate);
}

#if LORAPLEX_ORDER == 2

// A pair of bfloat16 in each lane, of two vectors of floats; to the nearest, ties to even; NaN stays NaN.
inline vu lane_pairs(vf first, vf second) {
  bf16 halves[2 * LANES];
  store(halves, first);
  store(halves + LANES, second);
  typedef uint16_t v16 __attribute__((vector_size(2 * LANES)));
  v16 low, high;
  std::memcpy(&low, halves, sizeof low);
  std::memcpy(&high, halves + LANES, sizeof high);
  return __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16;
}

// The changes of the long segments in the sums of one panel of a part, tiles [16 outputs][16 rows] for some groups of
// rows, `stride` floats apart. The panel begins with the part's output `column`. The bits are those of `expand`.
inline void expand_sums(const Plan& plan, const SlotTable& table, const Fused& fused, int uses, int layer, int part,
                        int column, int group, int groups, const float* h, float* sums, size_t stride) {
  for (const Segment& segment : plan.segments) {
    int first = std::max(segment.first, group * TILE_ROWS), end = std::min(segment.end, (group + groups) * TILE_ROWS);
    if (!(segment.uses & uses) || !LORA_UNITS<bf16>.joined(segment) || first >= end) continue;
    // Calls change(sums, row) on a copy of each group's tile, of which only the segment's rows are kept.
    auto each_tile = [&](auto change) {
      for (int row = first, next; row < end; row = next) {
        next = std::min((row / TILE_ROWS + 1) * TILE_ROWS, end);
        float* tile = sums + (row / TILE_ROWS - group) * stride;
        if (next - row == TILE_ROWS) {
          change(tile, row);
          continue;
        }
        alignas(64) float copy[TILE_ROWS * PANEL];
        std::copy_n(tile, TILE_ROWS * PANEL, copy);
        change(copy, row);
        for (int o = 0; o < PANEL; o++)
          std::copy_n(copy + o * 16 + row % TILE_ROWS, next - row, tile + o * 16 + row % TILE_ROWS);
      }
    };
    auto entry_of = [&](int slot) -> const Entry& { return table.at(slot, layer, fused.projection[part]); };
    float gains[PANEL];
    auto pick = [&](int slot) {
      const float* gain = entry_of(slot).gain;
      return gain ? gain + column : nullptr;
    };
    if (segment.uses & GAIN && blend_gains(plan, segment, PANEL, pick, gains))
      each_tile([&](float* tile, int) {
        for (int o = 0; o < PANEL; o++) store(tile + o * 16, load(tile + o * 16) * gains[o]);
      });
    for (int t = segment.term_begin; t < segment.term_end; t++) {
      const Term& term = plan.terms[t];
      const Entry& entry = entry_of(term.slot);
      if (const float* bias = entry.bias)
        each_tile([&](float* tile, int) {
          for (int i = 0; i < PANEL * 16; i++) tile[i] = multiply_add(term.weight, bias[column + i / 16], tile[i]);
        });
      float* of_term = const_cast<float*>(h + part * plan.h_size + term.h);
      Blocked hidden{reinterpret_cast<bf16*>(of_term), table.max_ranks[term.slot]};
      for (int rank = 0; rank < entry.rank; rank += TILE_INPUTS) {
        alignas(64) bf16 columns[TILE];
        size_t width = fused.width[part];
        column_tile(static_cast<const bf16*>(entry.b) + rank * width + column, width,
                    std::min(entry.rank - rank, TILE_INPUTS), columns);
        each_tile([&](float* tile, int row) {
          add_columns(columns, hidden.at((row - segment.origin()) / TILE_ROWS * TILE_ROWS, rank), tile);
        });
      }
    }
  }
}

// The changes in sums [groups][gate, up][16 outputs][16 rows] of a panel of each.
inline void join_gates(const AdapterWork<bf16, bf16>& work, int group, int groups, int panel, float* sums) {
  const Product& product = work.product;
  for (int part = 0; part < product.fused.parts; part++)
    expand_sums(*product.plan, work.table, product.fused, product.uses, work.layer, part, panel * PANEL, group, groups,
                work.h, sums + part * 256, 2 * 256);
}

// Writes to `out` in exchanged form only.
inline void gated_unit(const Matrix& w, int activation, int rows, const Inputs& x, const Inputs& out,
                       const AdapterWork<bf16, bf16>& work, int unit) {
  int panels = w.out / 2 / PANEL, panel = unit % panels;
  int group = unit / panels * GROUPS_AT_ONCE;
  int groups = std::min(GROUPS_AT_ONCE, (rows + TILE_ROWS - 1) / TILE_ROWS - group);
  alignas(64) bf16 scratch[2 * KEPT_TILES * TILE];
  alignas(64) float sums[GROUPS_AT_ONCE * 2 * 256];
  sum_tiles({w, panel, 2, panels, 1, scratch}, x, group, groups, sums);
  if (w.bias)
    for (int i = 0; i < groups * 2 * PANEL; i++) {
      float bias = w.bias[(i / PANEL % 2 * panels + panel) * PANEL + i % PANEL];
      store(sums + i * 16, load(sums + i * 16) + bias);
    }
  join_gates(work, group, groups, panel, sums);
  for (int g = 0; g < groups; g++) {
    const float *gate = sums + g * 512, *up = gate + 256;
    bf16* to = out.exchanged + size_t(group + g) * Blocked::tiles(w.out / 2) * TILE + panel * PANEL * out.columns;
    auto value = [&](int o) { return activated(load(gate + o * 16), activation) * load(up + o * 16); };
    for (int o = 0; o < PANEL; o += 2) {
      vu pairs = lane_pairs(value(o), value(o + 1));
      std::memcpy(to + o * out.columns, &pairs, 4 * out.columns);
    }
    if (panels % 2 && panel + 1 == panels) std::fill_n(to + out.tile() / 2, out.tile() / 2, bf16{0});
  }
}

#else

inline void gated_unit(const Matrix& w, int activation, int rows, const Inputs& x, const Inputs& out,
                       const AdapterWork<bf16, bf16>&, int unit) {
  int panels = w.out / 2 / PANEL, panel = unit % panels;
  int first = unit / panels * GROUPS_AT_ONCE * TILE_ROWS, end = std::min(rows, first + GROUPS_AT_ONCE * TILE_ROWS);
  alignas(64) float gate[TILE_ROWS * PANEL], up[TILE_ROWS * PANEL];
  for (; first < end; first += TILE_ROWS) {
    int count = std::min(TILE_ROWS, end - first);
    some_rows<TILE_ROWS>(count, w, panel, x.rows.at(first, 0), gate);
    some_rows<TILE_ROWS>(count, w, panels + panel, x.rows.at(first, 0), up);
    for (int r = 0; r < count; r++) {
      vf a = load(gate + r * PANEL), b = load(up + r * PANEL);
      if (w.bias) a += load(w.bias + panel * PANEL), b += load(w.bias + (panels + panel) * PANEL);
      float row[PANEL];
      store(row, activated(a, activation) * b);
      out.rows.put(first + r, panel * PANEL, PANEL, row);
    }
  }
}

#endif

}  // namespace loraplex

#endif  // LORAPLEX_ORDER
