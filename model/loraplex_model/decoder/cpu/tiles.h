// The step of the products of bfloat16: sums of a tile of 16 x 16 floats over 32 inputs.
//
// There are two orders of sums, each of an instruction, and each with a software version that gives the
// same bits on any processor:
//
//   PAIRS (VDPBF16PS): the inputs are taken in pairs; the odd product is added to the sum, then the even one.
//   TILES (AMX):       for each 32 inputs, one chain of sums over the even products and one over the odd
//                      ones, both from zero; then even + odd is added to the sum.
//
// A library has one of them, or none. A tile of bfloat16 is 1 KB: 16 rows of 32 elements.
#pragma once

#include <algorithm>

#include "simd.h"

#ifdef LORAPLEX_BF16  // a software version, by the number of its order
#define LORAPLEX_ORDER LORAPLEX_BF16
#elif defined(__AMX_BF16__)
#define LORAPLEX_ORDER 2
#define LORAPLEX_AMX
#elif defined(__AVX512BF16__)
#define LORAPLEX_ORDER 1
#define LORAPLEX_VDPBF16PS
#else
#define LORAPLEX_ORDER 0
#endif

#if defined(LORAPLEX_AMX) || defined(LORAPLEX_VDPBF16PS)
#include <immintrin.h>
#endif

namespace loraplex {

enum class Order { NONE, PAIRS, TILES };
constexpr Order ORDER = Order(LORAPLEX_ORDER);

constexpr int TILE_ROWS = 16;
constexpr int TILE_INPUTS = 32;
constexpr int TILE = TILE_ROWS * TILE_INPUTS;  // elements

#if LORAPLEX_ORDER

// Makes the compiler finish writing what `p` points to before tiles are read from it: it takes the tile
// instructions for ones that read no memory, or eight bytes of it.
inline void written(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

static_assert(LANES == 16, "a row of a tile is one vector");

// The tile registers of a thread, configured for as long as this lives. Each thread needs one around its
// products. AMX takes subnormal numbers as zero; meanwhile the thread's other arithmetic does so as well, so
// that FMAs in the order TILES give the same bits. Nothing without AMX.
class TileRegisters {
 public:
  TileRegisters() {
#ifdef LORAPLEX_AMX
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    written(&config);
    _tile_loadconfig(&config);
    _mm_setcsr(mode_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
#endif
  }
  ~TileRegisters() {
#ifdef LORAPLEX_AMX
    _tile_release();
    _mm_setcsr(mode_);
#endif
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
#ifdef LORAPLEX_AMX
  unsigned mode_ = _mm_getcsr();
#endif
};

inline vf even(vu pairs) { return bit_cast<vf>(pairs << 16); }
inline vf odd(vu pairs) { return bit_cast<vf>(pairs & 0xffff0000u); }

inline vu load_pairs(const bf16* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// The pair at p in every lane.
inline vu broadcast_pair(const bf16* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return pair - vu{};
}

// Two vectors, one after the other, rounded to bfloat16, as pairs of neighbours.
inline vu rounded_pairs(vf a, vf b) {
#if defined(LORAPLEX_AMX) || defined(LORAPLEX_VDPBF16PS)
  return (vu)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
  bf16 both[2 * LANES];
  store(both, a);
  store(both + LANES, b);
  return load_pairs(both);
#endif
}

// sum + a . b for a pair of each lane, in the order PAIRS.
inline vf add_pairs(vf sum, vu a, vu b) {
#ifdef LORAPLEX_VDPBF16PS
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return even(a) * even(b) + (odd(a) * odd(b) + sum);
#endif
}

// c[16][16] = sum over `steps` steps of a[16][32] . b[16][16][2]: rows of a, with `a_stride` elements from
// one to the next and `a_step` from one step to the next; of b, pairs of inputs for 16 columns. Only the
// first `rows` rows of c are defined, but all 16 of a are read.
inline void tile_product(int rows, const bf16* a, size_t a_stride, size_t a_step, const bf16* b, size_t b_stride,
                         size_t b_step, int steps, float* c) {
#ifdef LORAPLEX_AMX
  _tile_zero(0);
  for (int s = 0; s < steps; s++, a += a_step, b += b_step) {
    _tile_loadd(1, a, a_stride * sizeof(bf16));
    _tile_loadd(2, b, b_stride * sizeof(bf16));
    _tile_dpbf16ps(0, 1, 2);
  }
  _tile_stored(0, c, 64);
#else
  for (int m = 0; m < rows; m++) {
    vf sum = {};
    for (int s = 0; s < steps; s++) {
      vf evens = {}, odds = {};
      for (int k = 0; k < TILE_INPUTS / 2; k++) {
        vu x = broadcast_pair(a + m * a_stride + s * a_step + 2 * k), w = load_pairs(b + k * b_stride + s * b_step);
        if constexpr (ORDER == Order::PAIRS) {
          sum = add_pairs(sum, x, w);
        } else {
          evens = even(x) * even(w) + evens;
          odds = odd(x) * odd(w) + odds;
        }
      }
      if constexpr (ORDER == Order::TILES) sum += evens + odds;
    }
    store(c + m * 16, sum);
  }
#endif
}

#ifdef LORAPLEX_AMX
// The compiler must not move writes of what a tile is loaded from, so each load counts as one of all memory.
template <int REGISTER>
inline void load_tile(const void* p, size_t bytes) {
  asm volatile("tileloadd\t(%0,%1,1), %%tmm%c2" ::"r"(p), "r"(bytes), "i"(REGISTER) : "memory");
}
template <int REGISTER>
inline void store_tile(void* p) {
  asm volatile("tilestored\t%%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(64l), "i"(REGISTER) : "memory");
}
template <int REGISTER>
inline void zero_tile() {
  asm volatile("tilezero\t%%tmm%c0" ::"i"(REGISTER));
}
template <int SUM, int A, int B>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps\t%%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

template <int COUNT, bool ZERO, int I = 0>
inline void begin_sums(const float* c) {
  if constexpr (I < COUNT) {
    if constexpr (ZERO) zero_tile<I>();
    else load_tile<I>(c + I * 256, 64);
    begin_sums<COUNT, ZERO, I + 1>(c);
  }
}
template <int COUNT, int I = 0>
inline void end_sums(float* c) {
  if constexpr (I < COUNT) {
    store_tile<I>(c + I * 256);
    end_sums<COUNT, I + 1>(c);
  }
}
template <int R, int N, int I = 0>
inline void multiply_columns(const bf16* const* b, size_t bytes) {
  if constexpr (I < N) {
    load_tile<6 + I % 2>(b[I], bytes);
    multiply_tiles<I * R, 4, 6 + I % 2>();
    if constexpr (R == 2) multiply_tiles<I * R + 1, 5, 6 + I % 2>();
    multiply_columns<R, N, I + 1>(b, bytes);
  }
}
#else
// One step of M rows and N tiles of columns.
template <int M, int N, int C>
inline void multiply_rows(const bf16* a, const bf16* const* b, size_t b_stride, float* c) {
  vf sums[M][N], evens[M][N] = {}, odds[M][N] = {};
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sums[m][n] = load(c + n * C + m * 16);
  for (int k = 0; k < TILE_INPUTS / 2; k++) {
    vu w[N];
    for (int n = 0; n < N; n++) w[n] = load_pairs(b[n] + k * b_stride);
    for (int m = 0; m < M; m++) {
      vu x = broadcast_pair(a + m * TILE_INPUTS + 2 * k);
      for (int n = 0; n < N; n++)
        if constexpr (ORDER == Order::PAIRS) {
          sums[m][n] = add_pairs(sums[m][n], x, w[n]);
        } else {
          evens[m][n] = even(x) * even(w[n]) + evens[m][n];
          odds[m][n] = odd(x) * odd(w[n]) + odds[m][n];
        }
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++)
      store(c + n * C + m * 16, ORDER == Order::PAIRS ? sums[m][n] : sums[m][n] + (evens[m][n] + odds[m][n]));
}
#endif

// Adds a . b to c, or sets c to it, over `steps` steps: R tiles of rows, of which the first `rows` rows are
// defined in c, and N tiles of columns; R * N is at most 4. a is [steps][R][16][32], c [N][R][16][16], and
// b(step, n) the first pair of tile n, whose pairs are `b_stride` elements apart. Each step calls it once.
template <int R, int N, bool ZERO, class B>
inline void chain(int rows, const bf16* a, int steps, B b, size_t b_stride, float* c) {
  static_assert(R <= 2 && R * N <= 4);
#ifdef LORAPLEX_AMX
  begin_sums<R * N, ZERO>(c);
  for (int s = 0; s < steps; s++, a += R * TILE) {
    const bf16* at[N];
    for (int n = 0; n < N; n++) at[n] = b(s, n);
    load_tile<4>(a, 64);
    if constexpr (R == 2) load_tile<5>(a + TILE, 64);
    multiply_columns<R, N>(at, b_stride * sizeof(bf16));
  }
  end_sums<R * N>(c);
#else
  if (ZERO) std::memset(c, 0, R * N * 256 * sizeof(float));
  for (int s = 0; s < steps; s++, a += R * TILE) {
    const bf16* at[N];
    for (int n = 0; n < N; n++) at[n] = b(s, n);
    for (int m = 0; m < rows;) {
      const bf16* x = a + m * TILE_INPUTS;
      float* y = c + m / TILE_ROWS * 256 + m % TILE_ROWS * 16;
      switch (std::min(rows - m, 4)) {
        case 1: multiply_rows<1, N, R * 256>(x, at, b_stride, y); break;
        case 2: multiply_rows<2, N, R * 256>(x, at, b_stride, y); break;
        case 3: multiply_rows<3, N, R * 256>(x, at, b_stride, y); break;
        default: multiply_rows<4, N, R * 256>(x, at, b_stride, y);
      }
      m += 4;
    }
  }
#endif
}

#endif  // LORAPLEX_ORDER

}  // namespace loraplex
