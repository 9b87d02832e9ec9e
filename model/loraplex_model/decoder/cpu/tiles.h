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

static_assert(LANES == 16, "a row of a tile is one vector");

// The tile registers of a thread, configured for as long as this lives. Each thread needs one around its
// products. Nothing without AMX.
class TileRegisters {
 public:
  TileRegisters() {
#ifdef LORAPLEX_AMX
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
#endif
  }
  ~TileRegisters() {
#ifdef LORAPLEX_AMX
    _tile_release();
#endif
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
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

#endif  // LORAPLEX_ORDER

}  // namespace loraplex
