// Vectors of floats for the sampler, exponentials, and sums in float64.
//
// The sampler's results must be those of its numpy form (server/loraplex_server/engine/batching/sampler.py),
// bit for bit wherever that is possible. So products are added with one rounding on every instruction set,
// exponentials use numpy's approximation, and sums add in numpy's order. The number of lanes changes no bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace loraplex::sampling {

#if defined(__AVX512F__)
constexpr int WIDE = 16;
#elif defined(__AVX2__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif
typedef float wf __attribute__((vector_size(WIDE * 4)));
typedef int32_t wi __attribute__((vector_size(WIDE * 4)));
typedef uint32_t wu __attribute__((vector_size(WIDE * 4)));
typedef double wd __attribute__((vector_size(WIDE * 8)));
typedef float f8 __attribute__((vector_size(32)));
typedef double d8 __attribute__((vector_size(64)));

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline wf load_wide(const float* p) { return load_as<wf>(p); }
inline void store_wide(float* p, wf v) { std::memcpy(p, &v, sizeof v); }
inline wf wide(float x) { return x - wf{}; }
inline wf wide_max(wf a, wf b) { return a > b ? a : b; }
inline wf wide_min(wf a, wf b) { return a < b ? a : b; }

inline float largest(wf v) {
  float most = v[0];
  for (int i = 1; i < WIDE; i++) most = v[i] > most ? v[i] : most;
  return most;
}

inline float smallest(wf v) { return -largest(-v); }

// The first `count` values, as far as the vector reaches, and `fill` in the other lanes.
inline wf load_part(const float* p, int count, float fill) {
  if (count >= WIDE) return load_wide(p);
  wf v = wide(fill);
  if (count > 0) std::memcpy(&v, p, count * sizeof *p);
  return v;
}

// out[i] = f(x[i]) for `count` values from the i-th on; `out` has room for whole vectors, and their last lanes
// become f(fill).
template <class F>
inline void map_row(const float* x, int first, int count, float fill, float* out, F f) {
  int i = first, end = first + count;
  for (; i + WIDE <= end; i += WIDE) store_wide(out + i, f(load_wide(x + i)));
  if (i < end) store_wide(out + i, f(load_part(x + i, end - i, fill)));
}

// Whether any lane of a comparison holds.
inline bool any(wi mask) {
#ifdef __AVX512F__
  __m512i m = (__m512i)mask;
  return _mm512_test_epi32_mask(m, m) != 0;
#else
  typedef uint64_t w8 __attribute__((vector_size(WIDE * 4)));
  w8 all = (w8)mask;
  uint64_t found = 0;
  for (int i = 0; i < WIDE / 2; i++) found |= all[i];
  return found != 0;
#endif
}

// a * b + c with one rounding.
inline wf fused(wf a, wf b, wf c) {
#ifdef __FMA__
  return a * b + c;
#else
  // The product of two floats is exact in double. Its sum is rounded there first, which changes about one
  // result in a billion.
  wd sum = __builtin_convertvector(a, wd) * __builtin_convertvector(b, wd) + __builtin_convertvector(c, wd);
  return __builtin_convertvector(sum, wf);
#endif
}

// p * 2^n for integers n in [-126, 0] and p in [0.5, 2].
inline wf times_power(wf p, wf n) {
#ifdef __AVX512F__
  return (wf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (wf)((__builtin_convertvector(n, wi) + 127) << 23);
#endif
}

// exp(x) for x <= 0, with the bits of numpy on processors with FMA: 2^n times P(r) / Q(r), with
// n = x / log 2 to the nearest integer and r = x - n log 2. Below 1e-37, and for NaN, it is 0: beside the
// largest weight, which is 1, such values change no sum, and processors are slow to compute them.
inline wf exponential(wf x) {
  const wf log2e = wide(1.44269504088896341f), magic = wide(0x1.8p+23f);
  wf scaled = x * log2e;
  wi counts = scaled >= -123.0f;  // compared, so that the next sum is not fused with the product
  wf n = (scaled + magic) - magic;
  wf r = fused(n, wide(-6.93145752e-1f), x);
  r = fused(n, wide(-1.42860677e-6f), r);
  wf p = fused(wide(5.082762527590693718096e-04f), r, wide(6.757896990527504603057e-03f));
  p = fused(p, r, wide(5.114512081637298353406e-02f));
  p = fused(p, r, wide(2.473615434895520810817e-01f));
  p = fused(p, r, wide(7.257664613233124478488e-01f));
  p = fused(p, r, wide(9.999999999980870924916e-01f));
  wf q = fused(wide(2.159509375685829852307e-02f), r, wide(-2.742335390411667452936e-01f));
  q = fused(q, r, wide(1.0f));
  return counts ? times_power(p / q, n) : wf{};
}

// Division by one number, rounded as the processor's own division rounds it: the quotient by the rounded
// reciprocal is corrected twice (Markstein, IBM Journal of Research and Development 34(1), 1990), which is
// faster. Minus infinity may give NaN, and values next to nothing may differ; `exponential` treats both
// as if they were exact.
class Divisor {
 public:
  explicit Divisor(float by) : by_(wide(by)), inverse_(wide(1.0f / by)), is_one_(by == 1.0f) {
#ifdef __FMA__
    is_ordinary_ = by > 1e-6f && by < 1e6f;
#endif
  }

  wf operator()(wf x) const {
    if (is_one_) return x;
    if (!is_ordinary_) return x / by_;
    wf quotient = x * inverse_;
    quotient = fused(fused(-quotient, by_, x), inverse_, quotient);
    return fused(fused(-quotient, by_, x), inverse_, quotient);
  }
  wf exact(wf x) const { return is_one_ ? x : x / by_; }

 private:
  wf by_, inverse_;
  bool is_one_, is_ordinary_ = false;
};

// The sum in float64, in the order of numpy: eight sums in turns over at most 128 values, then by halves.
inline double pairwise(const float* a, int64_t n) {
  if (n < 8) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i];
    return sum;
  }
  if (n <= 128) {
    auto eight = [&](int64_t i) { return __builtin_convertvector(load_as<f8>(a + i), d8); };
    d8 r = eight(0);
    int64_t i = 8;
    for (; i + 8 <= n; i += 8) r += eight(i);
    double sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
    for (; i < n; i++) sum += a[i];
    return sum;
  }
  int64_t half = n / 2;
  half -= half % 8;
  return pairwise(a, half) + pairwise(a + half, n - half);
}

constexpr int CHUNK = 8192, LEAF = 128;  // numpy converts so many values to float64 at a time

// Makes weights [n] and returns their sum. `make(i, count)` makes `count` weights from the i-th on; sums are
// taken of what was just made.
template <class Make>
inline double make_and_sum(const float* weights, int n, Make make) {
  double sum = 0, leaves[CHUNK / LEAF];
  int i = 0;
  for (; i + CHUNK <= n; i += CHUNK) {
    for (int leaf = 0; leaf < CHUNK / LEAF; leaf++) {
      make(i + leaf * LEAF, LEAF);
      leaves[leaf] = pairwise(weights + i + leaf * LEAF, LEAF);
    }
    for (int left = CHUNK / LEAF / 2; left; left /= 2)
      for (int at = 0; at < left; at++) leaves[at] = leaves[2 * at] + leaves[2 * at + 1];
    sum += leaves[0];
  }
  if (i == n) return sum;
  make(i, n - i);
  return sum + pairwise(weights + i, n - i);
}

inline double sum_of(const float* a, int n) {
  return make_and_sum(a, n, [](int, int) {});
}

}  // namespace loraplex::sampling
