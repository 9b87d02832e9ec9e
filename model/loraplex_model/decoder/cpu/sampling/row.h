// The next token of one row. Order of operations, random numbers and sums are those of the sampler's numpy
// form; so are the tokens, unless a random number or a sum for top-p lies within rounding (1e-12 of the
// total) of a boundary.
#pragma once

#include <vector>

#include "selection.h"

namespace loraplex::sampling {

constexpr int NON_FINITE = -1;
constexpr float HUGE_LOGIT = 1e30f;  // the largest adjusted logit
constexpr float FORBIDDEN = -3e38f;  // smaller than every adjusted logit, and finite
constexpr int SEGMENT = 256;         // weights whose sum is one step of the inversion

// How a request chooses its tokens, and its tokens so far; filled by base/draws.py.
struct Draw {
  uint64_t seed, index;  // of the random number
  double top_p;
  const int64_t* bias_ids;
  const float* bias_values;
  const int64_t* seen_ids;     // tokens of prompt and output that the repetition penalty changes
  const int64_t* counted_ids;  // tokens of the output
  const float* counts;         // and how often each occurred
  const uint32_t* mask;        // one bit for each token that may be chosen; null: all may
  int32_t biased, seen, counted;
  int32_t top_k;
  float divisor, min_p, log_min_p;  // divisor: the temperature
  float repetition, presence, frequency;
  int32_t greedy, plain;  // plain: no bias and no penalty
};

// Memory of one thread, for rows of one length.
struct Scratch {
  std::vector<float> adjusted, weights, values;
  std::vector<int32_t> ids, places;

  void fit(size_t vocab) {
    for (auto* each : {&adjusted, &weights, &values}) each->resize(vocab + WIDE);
    for (auto* each : {&ids, &places}) each->resize(vocab + WIDE);
  }
};

inline uint64_t scramble(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// SplitMix64 from a scrambled seed, in [0, 1).
inline double uniform(uint64_t seed, uint64_t index) {
  return double(scramble(scramble(seed) + (index + 1) * 0x9E3779B97F4A7C15u) >> 11) * 0x1p-53;
}

inline float clipped(float x) { return std::min(std::max(x, -HUGE_LOGIT), HUGE_LOGIT); }

// The largest of n > 0 logits; NaN if any is not finite.
inline float largest_finite(const float* x, int n) {
  wf most[4] = {wide(x[0]), wide(x[0]), wide(x[0]), wide(x[0])};
  wi worst[4] = {};
  auto take = [&](int at, wf v) {
    wi magnitude = (wi)v & 0x7fffffff;
    most[at] = wide_max(most[at], v);
    worst[at] = worst[at] > magnitude ? worst[at] : magnitude;
  };
  int i = 0;
  for (; i + 4 * WIDE <= n; i += 4 * WIDE)
    for (int at = 0; at < 4; at++) take(at, load_wide(x + i + at * WIDE));
  for (; i < n; i += WIDE) take(0, load_part(x + i, n - i, x[0]));
  for (int at = 1; at < 4; at++) {
    most[0] = wide_max(most[0], most[at]);
    worst[0] = worst[0] > worst[at] ? worst[0] : worst[at];
  }
  bool finite = true;
  for (int i = 0; i < WIDE; i++) finite = finite && worst[0][i] < 0x7f800000;
  return finite ? largest(most[0]) : NAN;
}

inline int first_that_equals(const float* x, int n, float value) {
  const wf wanted = wide(value);
  int i = 0;
  while (i + WIDE <= n && !any(load_wide(x + i) == wanted)) i += WIDE;
  while (i < n - 1 && x[i] != value) i++;
  return i;
}

// Bias, then penalties, into `out`. Every operation is rounded by itself, hence `volatile`. Ids outside of
// the vocabulary are skipped.
inline void adjust(const Draw& draw, const float* x, int n, float* out) {
  for (int i = 0; i < n; i += WIDE) {
    wf v = load_part(x + i, n - i, 0), least = wide(-HUGE_LOGIT), most = wide(HUGE_LOGIT);
    v = v < least ? least : v;
    store_wide(out + i, v > most ? most : v);  // `out` has room for whole vectors
  }
  auto change = [&](const int64_t* ids, int count, auto changed) {
    for (int i = 0; i < count; i++)
      if (uint64_t(ids[i]) < uint64_t(n)) out[ids[i]] = changed(out[ids[i]], i);
  };
  change(draw.bias_ids, draw.biased, [&](float v, int i) { return v + draw.bias_values[i]; });
  change(draw.seen_ids, draw.seen,
         [&](float v, int) { return v < 0 ? v * draw.repetition : v / draw.repetition; });
  change(draw.counted_ids, draw.counted, [&](float v, int i) {
    volatile float frequent = draw.frequency * draw.counts[i];
    volatile float less = v - frequent;
    return less - draw.presence;
  });
  auto clip = [](float v, int) { return clipped(v); };
  change(draw.bias_ids, draw.biased, clip);
  change(draw.seen_ids, draw.seen, clip);
  change(draw.counted_ids, draw.counted, clip);
}

// Leaves no weight to the tokens whose bits are not set. At least one is set.
inline void restrict_to(const uint32_t* mask, int n, float* out) {
  for (int first = 0; first < n; first += 32) {
    const uint32_t bits = mask[first / 32];
    if (bits == ~0u) continue;
    const int count = std::min(32, n - first);
    for (int i = 0; i < count; i++) out[first + i] = bits >> i & 1 ? out[first + i] : FORBIDDEN;
  }
}

// The index at which the running sum of the weights passes the fraction u of the total.
inline int invert(const float* weights, int n, double u, std::vector<double>& ends) {
  int segments = (n + SEGMENT - 1) / SEGMENT;
  ends.resize(2 * segments);
  double* sums = ends.data() + segments;
  double end = 0;
  for (int s = 0; s < segments; s++) {
    const float* at = weights + s * SEGMENT;
    int count = std::min(SEGMENT, n - s * SEGMENT);
    sums[s] = at[0] + pairwise(at + 1, count - 1);
    ends[s] = end += sums[s];
  }
  double target = u * end;
  int segment = int(std::upper_bound(ends.data(), ends.data() + segments, target) - ends.data());
  segment = std::min(segment, segments - 1);
  target -= ends[segment] - sums[segment];
  int at = segment * SEGMENT, stop = std::min(n, at + SEGMENT) - 1;
  double inside = weights[at];
  while (at < stop && inside <= target) inside += weights[++at];
  while (weights[at] == 0) at--;  // rounding led past the last token that has any weight
  return at;
}

// Tokens that may be drawn, in the order of their ids, and their weights; `ids` is null for all tokens.
struct Candidates {
  float* weights;
  int32_t* ids;
  int count;
};

// Keeps the candidates whose weights are at least `bound`.
inline void keep(Candidates& all, float bound, Scratch& scratch) {
  int32_t* places = all.ids ? scratch.places.data() : scratch.ids.data();
  int count = compact<FROM>(all.weights, all.count, bound, all.weights, places);
  if (all.ids)
    for (int i = 0; i < count; i++) all.ids[i] = all.ids[places[i]];
  else
    all.ids = places;
  all.count = count;
}

// The smallest float that is not below `bound`.
inline float at_least(double bound) {
  float near = float(bound);
  return double(near) < bound ? std::nextafter(near, INFINITY) : near;
}

// Keeps the smallest set of the largest weights whose share of their sum `total` reaches top_p; of weights
// that equal the smallest, the first by id.
inline void keep_nucleus(Candidates& all, double total, double top_p, Scratch& scratch) {
  // All weights below this bound sum to less than 1 - top_p of the total.
  keep(all, at_least((1.0 - top_p) * total / all.count), scratch);
  std::copy_n(all.weights, all.count, scratch.values.data());
  Boundary last = select<VALUES>(scratch.values.data(), all.count, top_p * total);
  keep(all, last.value, scratch);
  int equal = 0;
  for (int i = 0; i < all.count; i++) equal += all.weights[i] == last.value;
  if (equal == last.equal) return;
  int kept = equal = 0;
  for (int i = 0; i < all.count; i++) {
    if (all.weights[i] == last.value && equal++ >= last.equal) continue;
    all.ids[kept] = all.ids[i];
    all.weights[kept++] = all.weights[i];
  }
  all.count = kept;
}

// The candidates of a row after temperature, top-k, top-p and min-p, in this order. `most` is the row's
// largest logit.
inline Candidates candidates(const Draw& draw, const float* row, int n, float most, Scratch& scratch) {
  float* weights = scratch.weights.data();
  const wf shift = wide(most);
  const Divisor divide(draw.divisor);
  auto shifted = [=](int i) { return load_part(row + i, n - i, most) - shift; };
  bool by_rank = 0 < draw.top_k && draw.top_k < n, by_logit = draw.min_p > 0 && draw.top_p >= 1;
  Candidates all{weights, nullptr, n};
  double total = 0;
  if (by_rank || by_logit) {
    for (int i = 0; i < n; i += WIDE) store_wide(weights + i, divide.exact(shifted(i)));
    float least = by_rank ? kth_largest(weights, n, draw.top_k, scratch.values.data()) : draw.log_min_p;
    all.ids = scratch.ids.data();
    all.count = compact<FROM>(weights, n, least, weights, all.ids);
    for (int i = 0; i < all.count; i += WIDE)
      store_wide(weights + i, exponential(load_part(weights + i, all.count - i, 0)));
    if (draw.top_p < 1) total = sum_of(weights, all.count);
  } else {
    auto weigh = [=](wf logits) { return exponential(divide(logits - shift)); };
    total = make_and_sum(weights, n, [=](int first, int count) { map_row(row, first, count, most, weights, weigh); });
  }
  if (draw.top_p < 1) keep_nucleus(all, total, draw.top_p, scratch);
  if (draw.min_p > 0 && all.ids) keep(all, draw.min_p, scratch);
  return all;
}

// The token that follows; `NON_FINITE` if a logit of the row [n] is not finite.
inline int32_t choose(const Draw& draw, const float* row, int n, Scratch& scratch, std::vector<double>& ends) {
  float most = largest_finite(row, n);
  if (most != most) return NON_FINITE;
  if (!draw.plain || draw.mask) {
    adjust(draw, row, n, scratch.adjusted.data());
    if (draw.mask) restrict_to(draw.mask, n, scratch.adjusted.data());
    row = scratch.adjusted.data();
    most = largest_finite(row, n);
  }
  if (draw.greedy) return first_that_equals(row, n, most);
  Candidates all = candidates(draw, row, n, most, scratch);
  int at = invert(all.weights, all.count, uniform(draw.seed, draw.index), ends);
  return all.ids ? all.ids[at] : at;
}

}  // namespace loraplex::sampling
