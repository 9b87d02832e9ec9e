// y = x W^T + bias for weights kept in panels of 16 output rows, lanes across the outputs.
//
// An output element is one chain of sums: for each block of 64 inputs the products are summed in order,
// and the block's sum times its absmax is added to the element. The chain is the same for one row and for
// a thousand, so a row's bits never depend on the number of rows.
//
//   panel p, NF4:    codes  uint32 [in / 8][16], lane = output row, nibble j = input 8 i + j
//                    absmax float  [in / 64][16]
//   panel p, dense:  weights        [in][16]
#pragma once

#include <algorithm>

#include "simd.h"

namespace loraplex {

constexpr int PANEL = 16;            // output rows of a panel
constexpr int BLOCK = 64;            // inputs that share an absmax
constexpr int NV = PANEL / LANES;    // vectors across a panel
constexpr int MAX_ROWS = NV == 1 ? 12 : NV == 2 ? 6 : 2;  // rows whose sums fit in the registers
constexpr int CHUNK_ROWS = 96;       // rows of x that fit in the second-level cache
constexpr int MAX_DIRECT = 4;        // up to so many rows, weights are not expanded to memory

static_assert(PANEL % LANES == 0);

// How the weights of a matrix lie in memory: the packed kinds as in matmul_bf16.h.
enum class Kind : int32_t { nf4 = 0, bf16 = 1, f32 = 2, nf4_packed = 3, bf16_packed = 4 };

struct Matrix {
  const void* data;
  const float* absmax;  // nf4 only
  const float* bias;    // [out] or null
  int32_t out, in;
  Kind kind;
  int32_t reserved;
};

inline int panels(const Matrix& w) { return (w.out + PANEL - 1) / PANEL; }

// The 16 quantiles of NF4 (QLoRA, appendix E).
alignas(64) constexpr float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Looks up the NF4 values of nibble `j` of every lane.
struct Nf4Table {
#if LANES == 16
  vf all = load(NF4);
  vf operator()(vu codes, int j) const { return __builtin_shuffle(all, (vi)((codes >> (4 * j)) & 15)); }
#elif LANES == 8
  vf low = load(NF4), high = load(NF4 + 8);
  vf operator()(vu codes, int j) const {  // the shuffle takes indices modulo 8; the fourth bit selects the half
    vi index = (vi)(codes >> (4 * j));
    vi upper = (vi)(codes << (28 - 4 * j));
    return upper < 0 ? __builtin_shuffle(high, index) : __builtin_shuffle(low, index);
  }
#else
  vf operator()(vu codes, int j) const {
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = NF4[(codes[i] >> (4 * j)) & 15];
    return v;
  }
#endif
};

// The NF4 weights of one panel, input by input.
struct Nf4Panel {
  const uint32_t* codes;
  const float* absmax;
  Nf4Table table;

  Nf4Panel(const Matrix& w, int panel)
      : codes(static_cast<const uint32_t*>(w.data) + size_t(panel) * w.in * 2),
        absmax(w.absmax + size_t(panel) * (w.in / BLOCK) * PANEL) {}

  vf scale(int k, int v) const { return load(absmax + k / BLOCK * PANEL + v * LANES); }

  // Calls use(k, weights[NV]) for k in [first, end).
  template <class Use>
  void each(int first, int end, Use use) const {
    for (int k = first; k < end; k += 8) {
      vu c[NV];
      for (int v = 0; v < NV; v++) c[v] = load(codes + size_t(k) * 2 + v * LANES);
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        vf weights[NV];
        for (int v = 0; v < NV; v++) weights[v] = table(c[v], j);
        use(k + j, weights);
      }
    }
  }
};

// The dense weights of one panel, input by input.
template <class T>
struct DensePanel {
  const T* weights;

  DensePanel(const Matrix& w, int panel)
      : weights(static_cast<const T*>(w.data) + size_t(panel) * w.in * PANEL) {}

  vf scale(int, int) const { return set1(1.0f); }

  template <class Use>
  void each(int first, int end, Use use) const {
    for (int k = first; k < end; k++) {
      vf values[NV];
      for (int v = 0; v < NV; v++) values[v] = load(weights + size_t(k) * PANEL + v * LANES);
      use(k, values);
    }
  }
};

// y[M][16] += (x[M][first:end] . panel) * scale, with weights read in their stored form.
template <int M, class Panel>
inline void direct_block(const Panel& panel, const float* x, size_t stride, int first, int end, float* y) {
  vf sums[M][NV] = {};
  panel.each(first, end, [&](int k, const vf* weights) {
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) sums[m][v] = x[m * stride + k] * weights[v] + sums[m][v];
  });
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) {
      float* at = y + m * PANEL + v * LANES;
      store(at, sums[m][v] * panel.scale(first, v) + load(at));
    }
}

// The same with weights already expanded to float, [end - first][16].
template <int M, class Panel>
inline void expanded_block(const Panel& panel, const float* expanded, const float* x, size_t stride,
                           int first, int end, float* y) {
  vf sums[M][NV] = {};
  for (int k = first; k < end; k++) {
    vf weights[NV];
    for (int v = 0; v < NV; v++) weights[v] = load(expanded + (k - first) * PANEL + v * LANES);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) sums[m][v] = x[m * stride + k] * weights[v] + sums[m][v];
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) {
      float* at = y + m * PANEL + v * LANES;
      store(at, sums[m][v] * panel.scale(first, v) + load(at));
    }
}

template <int M, class Panel>
inline void expanded_rows(int rows, const Panel& panel, const float* expanded, const float* x,
                          size_t stride, int first, int end, float* y) {
  if (rows == M)
    expanded_block<M>(panel, expanded, x, stride, first, end, y);
  else if constexpr (M > 1)
    expanded_rows<M - 1>(rows, panel, expanded, x, stride, first, end, y);
}

template <int M, class Panel>
inline void direct_rows(int rows, const Panel& panel, const float* x, size_t stride, int in, float* y) {
  if (rows == M) {
    for (int k = 0; k < in; k += BLOCK) direct_block<M>(panel, x, stride, k, std::min(k + BLOCK, in), y);
  } else if constexpr (M > 1) {
    direct_rows<M - 1>(rows, panel, x, stride, in, y);
  }
}

// y[rows][16] += x[rows][in] . panel
template <class Panel>
inline void panel_product(const Panel& panel, int in, const float* x, size_t stride, int rows, float* y) {
  if (rows <= MAX_DIRECT) return direct_rows<MAX_DIRECT>(rows, panel, x, stride, in, y);
  alignas(64) float expanded[BLOCK * PANEL];
  for (int k = 0; k < in; k += BLOCK) {
    int end = std::min(k + BLOCK, in);
    panel.each(k, end, [&](int i, const vf* weights) {
      for (int v = 0; v < NV; v++) store(expanded + (i - k) * PANEL + v * LANES, weights[v]);
    });
    for (int m = 0; m < rows; m += MAX_ROWS)
      expanded_rows<MAX_ROWS>(std::min(MAX_ROWS, rows - m), panel, expanded, x + m * stride, stride, k,
                              end, y + m * PANEL);
  }
}

// A part of a product: `rows` rows and the output columns [column, end). Adjacent tiles may share a panel;
// each writes its own columns only.
struct Tile {
  int first, rows, column, end;

  int panels() const { return (end + PANEL - 1) / PANEL - column / PANEL; }
  int units() const { return panels() * ((rows + CHUNK_ROWS - 1) / CHUNK_ROWS); }
};

// Floats from one row of a product's output to the next, so that 16 adjacent rows do not compete for the
// same places of a cache.
inline int row_stride(int width) {
  int lines = (width + 15) / 16;
  while (lines % 8 == 0) lines++;
  return lines * 16;
}

inline int matmul_units(const Tile& tile, const float*) { return tile.units(); }

inline Tile whole(const Matrix& w, int rows) { return {0, rows, 0, w.out}; }

// One unit of a tile of y[rows][out] = x[rows][in] W^T + bias: one panel for a chunk of rows. x and y point
// to row 0.
inline void matmul_unit(const Matrix& w, const Tile& tile, const float* x, float* y, size_t y_stride, int unit) {
  int panel = tile.column / PANEL + unit % tile.panels();
  int chunk = unit / tile.panels() * CHUNK_ROWS;
  int rows = std::min(CHUNK_ROWS, tile.rows - chunk);
  x += size_t(tile.first + chunk) * w.in;
  y += size_t(tile.first + chunk) * y_stride + size_t(panel) * PANEL;
  int width = std::min(PANEL, w.out - panel * PANEL);

  alignas(64) float sums[CHUNK_ROWS * PANEL];
  alignas(64) float start[PANEL] = {};
  if (w.bias) std::copy_n(w.bias + panel * PANEL, width, start);
  for (int m = 0; m < rows; m++) std::copy_n(start, PANEL, sums + m * PANEL);
  switch (w.kind) {
    case Kind::nf4: panel_product(Nf4Panel(w, panel), w.in, x, w.in, rows, sums); break;
    case Kind::bf16: panel_product(DensePanel<bf16>(w, panel), w.in, x, w.in, rows, sums); break;
    default: panel_product(DensePanel<float>(w, panel), w.in, x, w.in, rows, sums); break;
  }
  int from = std::max(0, tile.column - panel * PANEL), to = std::min(width, tile.end - panel * PANEL);
  for (int m = 0; m < rows; m++) std::copy(sums + m * PANEL + from, sums + m * PANEL + to, y + m * y_stride + from);
}

}  // namespace loraplex
