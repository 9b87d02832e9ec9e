// Mixtures of experts: a router chooses some experts for each row, and their weighted outputs are added.
//
// A pair is a row and one of its experts. Pairs are grouped by expert, so that an expert's weights are read
// once for all of its rows. Every element of a pair's output is the same chain of sums as in any other
// product, and a row adds its experts' outputs in the order of their numbers. So neither the other rows nor
// their experts change a row's bits.
#pragma once

#include <atomic>
#include <vector>

#include "lora.h"
#include "model.h"
#include "rows.h"
#include "team.h"

namespace loraplex {

// Number of floats of scratch memory that the steps below need, for a rank of the experts' adapters.
inline size_t experts_scratch(const Model& m, int max_rank) {
  return 2 * size_t(std::max(m.hidden, m.intermediate)) + m.num_experts + max_rank;
}

template <class T, class X>
class Experts {
 public:
  Experts(const Model& model, Workspace& workspace, const Plan& plan, int rows)
      : m(model), w(workspace), plan_(plan), rows_(rows), pairs_(rows * model.experts_per_token),
        chosen_(pairs_), pair_(pairs_), row_(pairs_), shares_(pairs_) {
    if (!m.num_experts) return;
    w.routed.reserve(size_t(pairs_) * m.hidden);
    w.gate_up.reserve(size_t(pairs_) * row_stride(2 * m.intermediate));
    w.gated.reserve(size_t(pairs_) * m.intermediate);
    w.outputs.reserve(size_t(pairs_) * m.hidden);
    Multiplied<X>::reserve(w.routed_inputs, pairs_, m.hidden);
    Multiplied<X>::reserve(w.gated_inputs, pairs_, m.intermediate);
  }

  // out[t] = sum over the experts e of row t of share * down_e(activation(gate_e x[t]) * up_e x[t]).
  // `scratch` returns the calling thread's scratch memory.
  template <class Scratch>
  void run(Team& team, int& phase, const Layer& layer, int l, const float* x, float* out, size_t out_stride,
           Scratch scratch) {
    team.run(phase, rows_, [&](int t) { route(static_cast<const T*>(layer.router), x, t, scratch()); });
    int both = 2 * m.intermediate;
    team.run(phase, 1, [&](int) {
      group();
      gate_up_units_ = units(both, Multiplied<X>::rows(w.routed.data(), w.routed_inputs));
      down_units_ = units(m.hidden, Multiplied<X>::rows(w.gated.data(), w.gated_inputs));
    });
    team.run(phase, pairs_, [&](int p) {
      std::copy_n(x + size_t(row_[p]) * m.hidden, m.hidden, w.routed.data() + size_t(p) * m.hidden);
      Multiplied<X>::put(w.routed_inputs, p, 0, m.hidden, w.routed.data() + size_t(p) * m.hidden);
    });
    int stride = row_stride(both);
    product(team, phase, layer.gate_up, w.routed.data(), w.routed_inputs, both, gate_up_units_, w.gate_up.data(),
            stride);
    adapt(team, phase, l, GATE_PROJ, w.routed.data(), m.hidden, w.gate_up.data(), m.intermediate, stride, scratch);
    adapt(team, phase, l, UP_PROJ, w.routed.data(), m.hidden, w.gate_up.data() + m.intermediate, m.intermediate, stride,
          scratch);
    team.run(phase, pairs_, [&](int p) {
      const float* gate = w.gate_up.data() + size_t(p) * stride;
      float* gated = w.gated.data() + size_t(p) * m.intermediate;
      activate_row(gate, gate + m.intermediate, m.activation, m.intermediate, gated);
      Multiplied<X>::put(w.gated_inputs, p, 0, m.intermediate, gated);
    });
    product(team, phase, layer.down, w.gated.data(), w.gated_inputs, m.hidden, down_units_, w.outputs.data(), m.hidden);
    adapt(team, phase, l, DOWN_PROJ, w.gated.data(), m.intermediate, w.outputs.data(), m.hidden, m.hidden, scratch);
    team.run(phase, rows_, [&](int t) { combine(t, out + t * out_stride); });
  }

 private:
  // Chooses the experts of row t, in the order of their numbers, and their shares.
  void route(const T* router, const float* x, int t, float* scratch) {
    int count = m.num_experts, k = m.experts_per_token;
    float* scores = scratch + m.hidden;
    split_rows<T>(x + size_t(t) * m.hidden, 1, m.hidden, scratch);
    shrink_rows<1>(scratch, router, m.hidden, count, 1.0f, scores, count);
    float top = *std::max_element(scores, scores + count), total = 0;
    for (int e = 0; e < count; e++) total += scores[e] = std::exp(scores[e] - top);
    int* chosen = chosen_.data() + size_t(t) * k;
    float* shares = shares_.data() + size_t(t) * k;
    float chosen_total = 0;
    for (int i = 0; i < k; i++) {
      chosen[i] = std::max_element(scores, scores + count) - scores;
      shares[i] = scores[chosen[i]];
      chosen_total += shares[i];
      scores[chosen[i]] = -1;
    }
    if (m.normalised_experts) total = chosen_total;
    for (int i = 0; i < k; i++) scores[chosen[i]] = shares[i] / total;
    std::sort(chosen, chosen + k);
    for (int i = 0; i < k; i++) shares[i] = scores[chosen[i]];
  }

  // Numbers the pairs by expert, then by row, and finds the rows of each expert.
  void group() {
    first_.assign(m.num_experts + 1, 0);
    for (int expert : chosen_) first_[expert + 1]++;
    for (int e = 0; e < m.num_experts; e++) first_[e + 1] += first_[e];
    std::vector<int> next(first_.begin(), first_.end() - 1);
    for (int i = 0; i < pairs_; i++) {
      pair_[i] = next[chosen_[i]]++;
      row_[pair_[i]] = i / m.experts_per_token;
    }
  }

  // The tile of the stacked matrix that an expert's rows are multiplied with.
  Tile tile(int expert, int width) const {
    return {first_[expert], first_[expert + 1] - first_[expert], expert * width, (expert + 1) * width};
  }

  // Units of the products of all experts.
  template <class Rows>
  int units(int width, const Rows& rows) const {
    int units = 0;
    for (int e = 0; e < m.num_experts; e++) units += matmul_units(tile(e, width), rows);
    return units;
  }

  // y[p] = W_e x[p] for every pair, rows `stride` apart; W_e are `width` rows of the stacked matrix.
  void product(Team& team, int& phase, const Matrix& stacked, const float* x, InputRows& inputs, int width,
               const std::atomic<int>& units, float* y, int stride) {
    auto rows = Multiplied<X>::rows(x, inputs);
    team.run(phase, units, [&](int unit) {
      int e = 0;
      for (int own; unit >= (own = matmul_units(tile(e, width), rows)); e++) unit -= own;
      matmul_unit(stacked, tile(e, width), rows, y - size_t(e) * width, stride, unit);
    });
  }

  // Adds the adapters' changes of a projection to y[p], whose rows are `stride` apart. An adapter has the
  // factors of all experts one after the other: a [experts][rank][in], b [experts][rank][out].
  template <class Scratch>
  void adapt(Team& team, int& phase, int l, int site, const float* x, int in, float* y, int out, int stride,
             Scratch scratch) {
    if (!(plan_.uses & FACTORS)) return;
    team.run(phase, pairs_, [&](int p) {
      const Segment* segment = plan_.segment(row_[p]);
      if (!segment || !(segment->uses & FACTORS)) return;
      float *split = scratch(), *h = split + in;
      bool is_split = false;
      for (int t = segment->term_begin; t < segment->term_end; t++) {
        const Term& term = plan_.terms[t];
        const Entry& entry = m.adapters.at(term.slot, l, site);
        if (!entry.b) continue;
        int rank = entry.rank / m.num_experts, expert = expert_of(p);
        const T* a = static_cast<const T*>(entry.a) + size_t(expert) * rank * in;
        const T* b = static_cast<const T*>(entry.b) + size_t(expert) * rank * out;
        if (!is_split) split_rows<T>(x + size_t(p) * in, 1, in, split);
        is_split = true;
        shrink_rows<1>(split, a, in, rank, term.weight, h, rank);
        expand_rows<T, 1>(h, rank, b, out, rank, out, y + size_t(p) * stride, stride);
      }
    });
  }

  int expert_of(int pair) const {
    return std::upper_bound(first_.begin(), first_.end(), pair) - first_.begin() - 1;
  }

  void combine(int t, float* out) const {
    std::fill_n(out, m.hidden, 0.0f);
    for (int i = t * m.experts_per_token; i < (t + 1) * m.experts_per_token; i++) {
      const float* from = w.outputs.data() + size_t(pair_[i]) * m.hidden;
      for (int c = 0; c < m.hidden; c++) out[c] = multiply_add(shares_[i], from[c], out[c]);
    }
  }

  const Model& m;
  Workspace& w;
  const Plan& plan_;
  int rows_, pairs_;
  std::vector<int> chosen_, pair_, row_;  // [rows][per token]: experts, pairs; [pairs]: rows
  std::vector<float> shares_;             // [rows][per token]
  std::vector<int> first_;                // [experts + 1], the first pair of each expert
  std::atomic<int> gate_up_units_{0}, down_units_{0};
};

}  // namespace loraplex
