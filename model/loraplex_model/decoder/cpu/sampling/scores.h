// Log-probabilities of one row.
#pragma once

#include "row.h"

namespace loraplex::sampling {

// The log-probability of `token`, and those of the `count` most probable tokens, of equals the first by
// id. The logits [n] are finite; 0 <= count <= n.
inline void score(const float* row, int n, int token, int count, Scratch& scratch, float* chosen, int32_t* ids,
                  float* values) {
  float most = largest_finite(row, n);
  float* weights = scratch.weights.data();
  auto weigh = [shift = wide(most)](wf logits) { return exponential(logits - shift); };
  double total = make_and_sum(
      weights, n, [=](int first, int count) { map_row(row, first, count, most, weights, weigh); });
  float shift = float(double(most) + std::log(total));
  *chosen = row[token] - shift;
  if (!count) return;
  float least = kth_largest(row, n, count, scratch.values.data());
  float* found = scratch.values.data();
  int kept = compact<FROM>(row, n, least, found, scratch.ids.data());
  int32_t* order = scratch.places.data();
  for (int i = 0; i < kept; i++) order[i] = i;
  std::partial_sort(order, order + count, order + kept, [&](int32_t a, int32_t b) {
    return found[a] > found[b] || (found[a] == found[b] && a < b);
  });
  for (int i = 0; i < count; i++) {
    ids[i] = scratch.ids[order[i]];
    values[i] = found[order[i]] - shift;
  }
}

}  // namespace loraplex::sampling
