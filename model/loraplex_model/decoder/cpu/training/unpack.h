// NF4 codes to floats: code[nibble] * maximum with one rounding, as in `nf4.dequantize`; or rounded to bf16.
#pragma once

#include "../matmul.h"

namespace loraplex {

// The codes of LANES consecutive weights, one per lane in the lowest four bits; a byte's first is its high half.
inline vu neighbours(const uint8_t* packed) {
  vu lanes, shifts;
  for (int i = 0; i < LANES; i++) shifts[i] = 8 * (i % 8 / 2) + (i % 2 ? 0 : 4);
#if LANES == 16
  uint32_t w[2];
  std::memcpy(w, packed, sizeof w);
  lanes = vu{w[0], w[0], w[0], w[0], w[0], w[0], w[0], w[0], w[1], w[1], w[1], w[1], w[1], w[1], w[1], w[1]};
#else
  uint32_t word = 0;
  std::memcpy(&word, packed, LANES / 2);
  lanes = word - vu{};
#endif
  return lanes >> shifts;
}

// Unpacks the `count` weights of one module; maxima [ceil(count / 64)]. The last block may be short.
template <class T>
inline void unpack_nf4(const uint8_t* packed, const float* maxima, int64_t count, T* out, int threads) {
  Nf4Table table;
  int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    const uint8_t* bytes = packed + block * BLOCK / 2;
    T* at = out + block * BLOCK;
    int width = int(std::min<int64_t>(BLOCK, count - block * BLOCK)), i = 0;
    vf scale = set1(maxima[block]);
    for (; i + LANES <= width; i += LANES) store(at + i, table(neighbours(bytes + i / 2), 0) * scale);
    for (; i < width; i++) store1(at + i, NF4[bytes[i / 2] >> (i % 2 ? 0 : 4) & 15] * maxima[block]);
  }
}

}  // namespace loraplex
