// The largest values of an array, found without putting the array in order.
#pragma once

#include <algorithm>
#include <utility>

#include "wide.h"

namespace loraplex::sampling {

// Which values `compact` keeps, compared with a bound.
enum Side { ABOVE, FROM, BELOW };

// Copies the values on one side of `bound`, in their order, and their places. `kept` (which may be `values`
// itself) and `places` (which may be null) have room for `WIDE` more than are kept. Returns how many are.
template <Side side>
inline int compact(const float* values, int n, float bound, float* kept, int32_t* places) {
  const wf limit = wide(bound);
  int count = 0;
  // Whether one vector has such values is hard to predict, so that is asked of four.
  for (int first = 0; first < n; first += 4 * WIDE) {
    wf v[4];
    for (int j = 0; j < 4; j++) v[j] = load_part(values + first + j * WIDE, n - first - j * WIDE, bound);
#ifdef __AVX512F__
    constexpr int compare = side == ABOVE ? _CMP_GT_OQ : side == FROM ? _CMP_GE_OQ : _CMP_LT_OQ;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 mask[4];
    for (int j = 0; j < 4; j++) mask[j] = _mm512_cmp_ps_mask((__m512)v[j], (__m512)limit, compare);
    if (!(mask[0] | mask[1] | mask[2] | mask[3])) continue;
    for (int j = 0; j < 4; j++) {
      int i = first + j * WIDE, left = n - i;
      if (left < WIDE) mask[j] &= left > 0 ? (1 << left) - 1 : 0;
      store_wide(kept + count, (wf)_mm512_maskz_compress_ps(mask[j], (__m512)v[j]));
      if (places) {
        __m512i at = _mm512_add_epi32(_mm512_set1_epi32(i), lanes);
        _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(mask[j], at));
      }
      count += __builtin_popcount(mask[j]);
    }
#else
    auto inside = [&](wf x) { return side == ABOVE ? x > limit : side == FROM ? x >= limit : x < limit; };
    if (!any(inside(v[0]) | inside(v[1]) | inside(v[2]) | inside(v[3]))) continue;
    for (int i = first; i < std::min(n, first + 4 * WIDE); i++) {
      float x = v[(i - first) / WIDE][(i - first) % WIDE];
      kept[count] = x;
      if (places) places[count] = i;
      count += side == ABOVE ? x > bound : side == FROM ? x >= bound : x < bound;
    }
#endif
  }
  return count;
}

// The last value of a selection, and how many of the values that equal it are selected.
struct Boundary {
  float value;
  int equal;
};

// What a selection sums: the values themselves, or how many they are.
enum Amount { VALUES, ONES };

constexpr int FEW = 32;

// The boundary among few values. `before` is the sum of the amounts of all larger values.
template <Amount amount>
inline Boundary walk(float* values, int n, double before, double target) {
  std::sort(values, values + n, [](float a, float b) { return a > b; });
  int count = 0;
  while (count < n && (before < target || count == 0)) before += amount == ONES ? 1.0 : values[count], count++;
  int equal = 0;
  for (int i = count; i > 0 && values[i - 1] == values[count - 1]; i--) equal++;
  return {values[count - 1], equal};
}

// The sum of the amounts of the values above `pivot`, and how many values equal it. Eight sums in turns on
// every instruction set.
template <Amount amount>
inline std::pair<double, int> sum_above(const float* values, int n, float pivot) {
  typedef int32_t i8 __attribute__((vector_size(32)));
  const f8 limit = pivot - f8{};
  d8 sums = {};
  i8 above = {}, equal = {};
  auto take = [&](f8 v) {
    above += v > limit;
    equal += v == limit;
    if (amount == VALUES) sums += __builtin_convertvector(v > limit ? v : f8{}, d8);
  };
  int i = 0;
  for (; i + 8 <= n; i += 8) take(load_as<f8>(values + i));
  f8 rest = -INFINITY - f8{};
  std::memcpy(&rest, values + i, (n - i) * sizeof *values);
  if (i < n) take(rest);
  double sum = 0;
  int count = 0;
  for (i = 0; i < 8; i++) {
    sum += amount == ONES ? -above[i] : sums[i];
    count -= equal[i];
  }
  return {sum, count};
}

// The boundary of the shortest run of the largest values whose amounts sum to at least `target`. At least
// one value is selected, and all of them if they sum to less. `values` [n + WIDE] are overwritten; n > 0.
//
// The side of a pivot that holds the boundary is looked at again, until few values are left. The pivot is
// the median of some of the values, so that no distribution of values makes this slow.
template <Amount amount>
inline Boundary select(float* values, int n, double target) {
  constexpr int SAMPLES = 15;
  double before = 0;
  while (n > FEW) {
    float samples[SAMPLES];
    for (int i = 0; i < SAMPLES; i++) samples[i] = values[int64_t(n - 1) * i / (SAMPLES - 1)];
    std::nth_element(samples, samples + SAMPLES / 2, samples + SAMPLES);
    const float pivot = samples[SAMPLES / 2];
    auto [above, equal] = sum_above<amount>(values, n, pivot);
    if (above > 0 && before + above >= target) {
      n = compact<ABOVE>(values, n, pivot, values, nullptr);
      continue;
    }
    before += above;
    const double each = amount == ONES ? 1.0 : pivot;
    if (before + equal * each >= target) {
      int count = std::max(0, int((target - before) / each) - 1);  // nearly; then exactly
      while (count < equal && before + count * each < target) count++;
      return {pivot, std::max(count, 1)};
    }
    before += equal * each;
    n = compact<BELOW>(values, n, pivot, values, nullptr);
    if (n == 0) return {pivot, equal};
  }
  return walk<amount>(values, n, before, target);
}

// The k-th largest of `values` [n], 0 < k <= n. `spare` has room for n + WIDE values.
inline float kth_largest(const float* values, int n, int k, float* spare) {
  // The k-th largest of maxima over groups is a bound; usually few values reach it.
  int depth = 64;
  while (depth > 4 && n / depth < 4 * k) depth /= 2;
  int groups = n / (depth * WIDE) * WIDE;
  float bound = -INFINITY;
  if (k <= groups / 2) {
    for (int g = 0; g < groups; g += WIDE) {
      const float* at = values + g * depth;
      wf most = load_wide(at);
      for (int i = 1; i < depth; i++) most = wide_max(most, load_wide(at + i * WIDE));
      store_wide(spare + g, most);
    }
    bound = select<ONES>(spare, groups, k).value;
  }
  int count = compact<FROM>(values, n, bound, spare, nullptr);
  return select<ONES>(spare, count, k).value;
}

}  // namespace loraplex::sampling
