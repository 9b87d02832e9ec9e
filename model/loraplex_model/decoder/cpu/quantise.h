// Weights to NF4 codes and block maxima: the bits of bitsandbytes' `quantize_4bit` on the CPU, in one pass.
//
// A whole block is multiplied by the reciprocal of its maximum, the short one at the end is divided by its
// maximum. A code is the number of midpoints between neighbouring values that a quotient exceeds, 15 for NaN.
#pragma once

#include "matmul.h"

namespace loraplex {

constexpr float LEAST_MAXIMUM = 1e-38f;  // the divisor of a block of zeros

inline float midpoint(int k) { return (NF4[k] + NF4[k + 1]) / 2; }

// The largest magnitude. Magnitudes are compared as integers, so infinity and NaN are larger than all numbers.
template <class T>
inline float maximum(const T* x, int count) {
  uint32_t most = 0;
  int i = 0;
  if (count >= LANES) {
    vu lanes{};
    for (; i + LANES <= count; i += LANES) {
      vu magnitude = bit_cast<vu>(load(x + i)) & 0x7fffffff;
      lanes = magnitude > lanes ? magnitude : lanes;
    }
    for (int lane = 0; lane < LANES; lane++) most = std::max<uint32_t>(most, lanes[lane]);
  }
  for (; i < count; i++) most = std::max(most, bit_cast<uint32_t>(load1(x + i)) & 0x7fffffff);
  return bit_cast<float>(most);
}

// Quantises the `count` weights of one module: packed [ceil(count / 2)], maxima [ceil(count / 64)].
template <class T>
inline void quantise_nf4(const T* weights, int64_t count, uint8_t* packed, float* maxima, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < (count + BLOCK - 1) / BLOCK; block++) {
    const T* x = weights + block * BLOCK;
    int width = int(std::min<int64_t>(BLOCK, count - block * BLOCK));
    alignas(64) int32_t codes[BLOCK] = {};
    float most = maximum(x, width);
    if (width == BLOCK) {
      vf inverse = set1(1.0f / std::max(most, LEAST_MAXIMUM));
      for (int i = 0; i < BLOCK; i += LANES) {
        vf quotient = load(x + i) * inverse;
        vi code = 15 - vi{};
        for (int k = 0; k < 15; k++) code += quotient <= set1(midpoint(k));  // true is -1
        std::memcpy(codes + i, &code, sizeof code);
      }
    } else {
      most = std::max(most, LEAST_MAXIMUM);
      for (int i = 0; i < width; i++)
        for (int k = 0; k < 15; k++) codes[i] += !(load1(x + i) / most <= midpoint(k));
      if (width % 2) codes[width] = 7;  // the code of zero
    }
    maxima[block] = most;
    uint8_t* bytes = packed + block * BLOCK / 2;
    for (int i = 0; i < (width + 1) / 2; i++) bytes[i] = uint8_t(codes[2 * i] << 4 | codes[2 * i + 1]);
  }
}

}  // namespace loraplex
