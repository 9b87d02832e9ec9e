// Vectors of float, written once for every instruction set.
//
// GCC's vector extensions provide the arithmetic; `a * b + c` contracts to one FMA where the target has
// it. LANES may exceed the hardware's width (the compiler splits such vectors), so that the AVX-512
// code can be tested on an AVX2 machine. The order of a sum depends on the length of the row only, so a
// row's bits are independent of the other rows of the batch.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

namespace loraplex {

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

// A bfloat16: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline vf set1(float x) { return x - vf{}; }

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vu load(const uint32_t* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return bit_cast<vf>(__builtin_convertvector(h, vu) << 16);
}
inline float load1(const float* p) { return *p; }
inline float load1(const bf16* p) { return bit_cast<float>(uint32_t(p->bits) << 16); }

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vf v) {  // to the nearest, ties to even; NaN stays NaN
  vu u = bit_cast<vu>(v);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu quiet = (u >> 16) | 0x40;
  vh h = __builtin_convertvector(v == v ? rounded : quiet, vh);
  std::memcpy(p, &h, sizeof h);
}
inline void store1(float* p, float x) { *p = x; }
inline void store1(bf16* p, float x) {
  uint32_t u = bit_cast<uint32_t>(x);
  p->bits = x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : (u >> 16) | 0x40;
}

#if LANES == 16
#define LORAPLEX_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LORAPLEX_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define LORAPLEX_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define LORAPLEX_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LANES == 8
#define LORAPLEX_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define LORAPLEX_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define LORAPLEX_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define LORAPLEX_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define LORAPLEX_LOW 0, 4, 1, 5
#define LORAPLEX_HIGH 2, 6, 3, 7
#define LORAPLEX_EVEN 0, 2, 4, 6
#define LORAPLEX_ODD 1, 3, 5, 7
#endif

// The elements at even (odd) places of a and b one after the other.
inline vf even_lanes(vf a, vf b) { return __builtin_shufflevector(a, b, LORAPLEX_EVEN); }
inline vf odd_lanes(vf a, vf b) { return __builtin_shufflevector(a, b, LORAPLEX_ODD); }

// a and b in turns, a[0], b[0], a[1], ...: the first and the second half.
inline vf interleave_low(vf a, vf b) { return __builtin_shufflevector(a, b, LORAPLEX_LOW); }
inline vf interleave_high(vf a, vf b) { return __builtin_shufflevector(a, b, LORAPLEX_HIGH); }

inline float sum(vf v) {  // pairwise: the upper half onto the lower, until one lane is left
#if LANES == 16
  typedef float v8 __attribute__((vector_size(32)));
  v8 eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LANES == 8
  vf eight = v;
#endif
  typedef float v4 __attribute__((vector_size(16)));
#if LANES >= 8
  v4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
            __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  v4 four = v;
#endif
  v4 two = four + __builtin_shufflevector(four, four, 2, 3, 2, 3);
  return two[0] + two[1];
}
// a * b + c of single floats, for the ends of rows. Written as an explicit FMA, because the compiler may
// compute all products of such a loop before the sums, in some instances of a template and not in others.
inline float multiply_add(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline float max_lane(vf v) {
  float m = v[0];
  for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
  return m;
}

// The greatest lane of each of LANES vectors, which are changed.
inline vf greatest_lanes(vf* x) {
  for (int n = LANES / 2; n; n /= 2)
    for (int i = 0; i < n; i++) x[i] = max(even_lanes(x[2 * i], x[2 * i + 1]), odd_lanes(x[2 * i], x[2 * i + 1]));
  return x[0];
}

// e^x within 2 ulp for x in [-87, 88], clamped outside; NaN stays NaN.
inline vf exp(vf x) {
  vf clamped = x > 88.0f ? set1(88.0f) : (x < -87.0f ? set1(-87.0f) : x);
  vf n = clamped * 1.44269504f + 12582912.0f - 12582912.0f;  // rounds to an integer
  vf r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * bit_cast<vf>(exponent);
}

}  // namespace loraplex
