// Products of bf16 matrices with sums in float, from tiles that lie one after the other:
//
//   a tile of the left matrix   [16 rows][32 inputs]           1 KB
//   a tile of the right matrix  [16 pairs of inputs][16 columns][2]   1 KB
//
// AMX multiplies such tiles in one instruction; otherwise pairs are added one by one (tiles.h). In builds with
// an order of sums only.
#pragma once

#include <algorithm>

#include "../tiles.h"
#include "memory.h"

#if LORAPLEX_ORDER
namespace loraplex {

inline int tiles(int count, int size) { return (count + size - 1) / size; }

#ifdef LORAPLEX_AMX
// c [16 M][width] = a b, or += if `add`; a's groups of rows lie `a_next` apart, b's groups of columns `b_next`.
template <int M, int N>
inline void multiply(const bf16* a, size_t a_next, const bf16* b, size_t b_next, int steps, float* c, int width,
                     bool add) {
  const int stride = width * 4;
  if (add) {
    _tile_loadd(0, c, stride);
    if constexpr (N == 2) _tile_loadd(1, c + 16, stride);
    if constexpr (M == 2) _tile_loadd(2, c + 16 * width, stride);
    if constexpr (M == 2 && N == 2) _tile_loadd(3, c + 16 * width + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int s = 0; s < steps; s++, a += TILE, b += TILE) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    if constexpr (N == 2) _tile_loadd(7, b + b_next, 64);
    if constexpr (M == 2) _tile_loadd(5, a + a_next, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (M == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (M == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, stride);
  if constexpr (N == 2) _tile_stored(1, c + 16, stride);
  if constexpr (M == 2) _tile_stored(2, c + 16 * width, stride);
  if constexpr (M == 2 && N == 2) _tile_stored(3, c + 16 * width + 16, stride);
}
#else
template <int M, int N>
inline void multiply(const bf16* a, size_t a_next, const bf16* b, size_t b_next, int steps, float* c, int width,
                     bool add) {
  constexpr int ROWS = 8;
  for (int m = 0; m < M * 16; m += ROWS) {
    const bf16* from = a + m / 16 * a_next + m % 16 * TILE_INPUTS;
    vf sums[ROWS][N];
    for (int r = 0; r < ROWS; r++)
      for (int n = 0; n < N; n++) sums[r][n] = add ? load(c + size_t(m + r) * width + n * 16) : vf{};
    for (int s = 0; s < steps; s++)
      for (int p = 0; p < 16; p++) {
        vu right[N];
        for (int n = 0; n < N; n++) right[n] = load_pairs(b + n * b_next + s * TILE + p * TILE_INPUTS);
        for (int r = 0; r < ROWS; r++) {
          vu left = broadcast_pair(from + s * TILE + r * TILE_INPUTS + 2 * p);
          for (int n = 0; n < N; n++) sums[r][n] = add_pairs(sums[r][n], left, right[n]);
        }
      }
    for (int r = 0; r < ROWS; r++)
      for (int n = 0; n < N; n++) store(c + size_t(m + r) * width + n * 16, sums[r][n]);
  }
}
#endif

// The 16 x 16 pairs of a tile, rows and columns exchanged.
inline void transpose(const bf16* from, bf16* to) {
  vu v[16], w[16];
  std::memcpy(v, from, sizeof v);
#define LORAPLEX_TURN(in, out, D, A, B)                                             \
  for (int i = 0; i < 16; i++)                                                      \
    if (!(i & D)) {                                                                 \
      out[i] = __builtin_shufflevector(in[i], in[i + D], A);                        \
      out[i + D] = __builtin_shufflevector(in[i], in[i + D], B);                    \
    }
#define LORAPLEX_A8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define LORAPLEX_B8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LORAPLEX_A4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define LORAPLEX_B4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LORAPLEX_A2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define LORAPLEX_B2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LORAPLEX_A1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define LORAPLEX_B1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
  LORAPLEX_TURN(v, w, 8, LORAPLEX_A8, LORAPLEX_B8)
  LORAPLEX_TURN(w, v, 4, LORAPLEX_A4, LORAPLEX_B4)
  LORAPLEX_TURN(v, w, 2, LORAPLEX_A2, LORAPLEX_B2)
  LORAPLEX_TURN(w, v, 1, LORAPLEX_A1, LORAPLEX_B1)
#undef LORAPLEX_TURN
  std::memcpy(to, v, sizeof v);
}

// Rounded to bf16, as `store` does; the instruction takes the smallest floats, below 1.2e-38, for zero.
inline void put16(bf16* to, vf v) {
#if defined(LORAPLEX_AMX) || defined(LORAPLEX_VDPBF16PS)
  auto narrow = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(to, &narrow, 32);
#else
  store(to, v);
#endif
}
inline void put16(float* to, vf v) { store(to, v); }
inline void copy32(const bf16* from, bf16* to) { std::memcpy(to, from, 64); }
inline void copy32(const float* from, bf16* to) {
  put16(to, load(from));
  put16(to + 16, load(from + 16));
}

// A tile of rows: from[r * stride + i], for `rows` rows and `width` inputs; the rest is zero.
template <class T>
inline void tile_of_rows(const T* from, size_t stride, int rows, int width, bf16* to) {
  if (rows < 16 || width < TILE_INPUTS) std::memset(to, 0, TILE * sizeof(bf16));
  for (int r = 0; r < std::min(rows, 16); r++) {
    const T* row = from + r * stride;
    if (width >= TILE_INPUTS) {
      copy32(row, to + r * TILE_INPUTS);
    } else {
      for (int i = 0; i < width; i++) store1(to + r * TILE_INPUTS + i, load1(row + i));
    }
  }
}

// bf16 bits of two vectors in pairs: lane i has a[i] in its lower half and b[i] in its upper.
inline vu paired(vf a, vf b) {
#if defined(LORAPLEX_AMX) || defined(LORAPLEX_VDPBF16PS)
  auto low = (vh)_mm512_cvtneps_pbh((__m512)a), high = (vh)_mm512_cvtneps_pbh((__m512)b);
  return __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16;
#else
  bf16 low[16], high[16];
  store(low, a);
  store(high, b);
  vh l, h;
  std::memcpy(&l, low, sizeof l);
  std::memcpy(&h, high, sizeof h);
  return __builtin_convertvector(l, vu) | __builtin_convertvector(h, vu) << 16;
#endif
}

template <class T>
inline vf part(const T* row, int count) {  // the first `count` of 16 values; the rest is zero
  if (count >= 16) return load(row);
  vf v = {};
  for (int i = 0; i < count; i++) v[i] = load1(row + i);
  return v;
}

// The first `count` of 16 values of two rows in pairs; a row that is null is zero.
inline vu row_pairs(const float* a, const float* b, int count) {
  return paired(a ? part(a, count) : vf{}, b ? part(b, count) : vf{});
}
inline vu row_pairs(const bf16* a, const bf16* b, int count) {
  vh low = {}, high = {};
  int bytes = 2 * std::max(0, std::min(count, 16));
  if (bytes == 32) {
    if (a) std::memcpy(&low, a, 32);
    if (b) std::memcpy(&high, b, 32);
  } else {
    if (a) std::memcpy(&low, a, bytes);
    if (b) std::memcpy(&high, b, bytes);
  }
  return __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16;
}

// A tile of pairs: its input k and column n are from[k * stride + n], for `depth` inputs and `columns` columns.
template <class T>
inline void tile_of_pairs(const T* from, size_t stride, int depth, int columns, bf16* to) {
  for (int p = 0; p < 16; p++) {
    const T* row = from + size_t(2 * p) * stride;
    vu both = row_pairs(2 * p < depth ? row : nullptr, 2 * p + 1 < depth ? row + stride : nullptr, columns);
    std::memcpy(to + p * TILE_INPUTS, &both, 64);
  }
}

// A tile of pairs whose input k and column n are from[n * stride + k].
template <class T>
inline void tile_of_columns(const T* from, size_t stride, int depth, int columns, bf16* to) {
  alignas(64) bf16 rows[TILE];
  tile_of_rows(from, stride, columns, depth, rows);
  transpose(rows, to);
}

// A tile of rows whose row r and input k are from[k * stride + r].
template <class T>
inline void tile_of_turned(const T* from, size_t stride, int rows, int depth, bf16* to) {
  alignas(64) bf16 pairs[TILE];
  tile_of_pairs(from, stride, depth, rows, pairs);
  transpose(pairs, to);
}

// Adds or stores the valid part of c [rows of 32] as floats or bf16.
template <class T>
inline void put_rows(const float* c, int width, int rows, int columns, T* out, size_t stride, bool add) {
  for (int r = 0; r < rows; r++) {
    const float* row = c + r * width;
    T* to = out + r * stride;
    int i = 0;
    for (; i + 16 <= columns; i += 16) put16(to + i, add ? load(to + i) + load(row + i) : load(row + i));
    for (; i < columns; i++) store1(to + i, add ? load1(to + i) + row[i] : row[i]);
  }
}

}  // namespace loraplex
#endif
