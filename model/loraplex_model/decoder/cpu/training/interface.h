// The C interface of training, for `ops` in Python.
#pragma once

#include "adapters.h"
#include "attention.h"
#include "elementwise.h"
#include "memory.h"
#include "products.h"
#include "unpack.h"

// The C interface. `narrow` says that T is bf16. Functions that allocate return a Fault.
extern "C" {

void loraplex_unpack_nf4(const uint8_t* packed, const float* maxima, int64_t count, void* out, int narrow,
                         int threads) {
  using namespace loraplex;
  if (narrow)
    unpack_nf4(packed, maxima, count, static_cast<bf16*>(out), threads);
  else
    unpack_nf4(packed, maxima, count, static_cast<float*>(out), threads);
}

void loraplex_train_rms_norm(const float* x, const float* weight, float eps, int rows, int width, float* scale,
                             void* out, int narrow, int threads) {
  using namespace loraplex;
  each_row(rows, threads, [&](size_t m) {
    scale[m] = inverse_rms(x + m * width, width, eps);
    if (narrow)
      scaled(x + m * width, scale[m], weight, width, static_cast<bf16*>(out) + m * width);
    else
      scaled(x + m * width, scale[m], weight, width, static_cast<float*>(out) + m * width);
  });
}

void loraplex_train_scaled(const float* x, const float* scale, const float* weight, int rows, int width, void* out,
                           int narrow, int threads) {
  using namespace loraplex;
  each_row(rows, threads, [&](size_t m) {
    if (narrow)
      scaled(x + m * width, scale[m], weight, width, static_cast<bf16*>(out) + m * width);
    else
      scaled(x + m * width, scale[m], weight, width, static_cast<float*>(out) + m * width);
  });
}

void loraplex_train_rms_norm_backward(const float* x, const float* scale, const float* weight, const void* g,
                                      int rows, int width, float* out, int narrow, int threads) {
  using namespace loraplex;
  each_row(rows, threads, [&](size_t m) {
    size_t at = m * width;
    if (narrow)
      rms_norm_backward(x + at, scale[m], weight, static_cast<const bf16*>(g) + at, width, out + at);
    else
      rms_norm_backward(x + at, scale[m], weight, static_cast<const float*>(g) + at, width, out + at);
  });
}

void loraplex_train_silu_mul(const void* gate_up, int rows, int width, void* out, int narrow, int threads) {
  using namespace loraplex;
  auto apply = [&](auto* from, auto* to) {
    each_row(rows, threads, [&](size_t m) {
      silu_mul(from + m * 2 * width, from + m * 2 * width + width, width, to + m * width);
    });
  };
  if (narrow)
    apply(static_cast<const bf16*>(gate_up), static_cast<bf16*>(out));
  else
    apply(static_cast<const float*>(gate_up), static_cast<float*>(out));
}

void loraplex_train_silu_mul_backward(const void* gate_up, const void* g, int rows, int width, void* out, int narrow,
                                      int threads) {
  using namespace loraplex;
  auto apply = [&](auto* from, auto* gradient, auto* to) {
    each_row(rows, threads, [&](size_t m) {
      auto gate = from + m * 2 * width;
      auto d_gate = to + m * 2 * width;
      silu_mul_backward(gate, gate + width, gradient + m * width, width, d_gate, d_gate + width);
    });
  };
  if (narrow)
    apply(static_cast<const bf16*>(gate_up), static_cast<const bf16*>(g), static_cast<bf16*>(out));
  else
    apply(static_cast<const float*>(gate_up), static_cast<const float*>(g), static_cast<float*>(out));
}

// Rotates the first `heads` heads of x [rows][width], in place; cos and sin are [rows][half].
void loraplex_train_rotate(loraplex::bf16* x, int rows, int width, int heads, int half, const float* cos,
                           const float* sin, float sign, int threads) {
  using namespace loraplex;
  each_row(rows, threads, [&](size_t m) {
    for (int h = 0; h < heads; h++)
      rotate(x + m * width + h * 2 * half, cos + m * half, sin + m * half, sign, half);
  });
}

// scores [rows][width]; see `cross_entropy`.
int loraplex_train_cross_entropy(loraplex::bf16* scores, const int64_t* targets, int rows, int width, int slope,
                                 float* losses, int threads) {
  using namespace loraplex;
  Units units;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer;
#pragma omp for schedule(static)
    for (int m = 0; m < rows; m++)
      units.run([&] {
        buffer.resize(width);
        losses[m] = cross_entropy(scores + size_t(m) * width, targets[m], width, slope, buffer.data());
      });
  }
  return fault_of([&] { units.check(); });
}

}  // extern "C"

// Products of bf16, in builds with an order of sums (tiles.h).
extern "C" {

int loraplex_train_has_products() { return LORAPLEX_ORDER != 0; }

#if LORAPLEX_ORDER
// See `base_product`; `in` is a multiple of 64.
int loraplex_train_product(const uint8_t* codes, const float* maxima, int out, int in, const loraplex::bf16* x,
                           int rows, int back, loraplex::bf16* y, int threads) {
  using namespace loraplex;
  return fault_of([&] { base_product(Packed{codes, maxima, out, in, {}}, x, rows, back, y, threads); });
}

int loraplex_train_head(const loraplex::bf16* head, int vocab, int width, const loraplex::bf16* x, int rows,
                        loraplex::bf16* scores, int threads) {
  return loraplex::fault_of([&] { loraplex::head_product(head, vocab, width, x, rows, scores, threads); });
}

int loraplex_train_head_gradient(const loraplex::bf16* head, int vocab, int width, const loraplex::bf16* g, int rows,
                                 float* out, int threads) {
  return loraplex::fault_of([&] { loraplex::head_gradient(head, vocab, width, g, rows, out, threads); });
}

// Attention of `sequences` from starts[s] to starts[s + 1] - 1; logs [heads][rows]. Strides are of rows, in elements.
int loraplex_train_attend(const loraplex::Attending* a, const int32_t* starts, int sequences, loraplex::bf16* out,
                          float* logs, int threads) {
  using namespace loraplex;
  Heads<bf16> to{out, int64_t(a->heads) * a->width};
  int64_t rows = starts[sequences];
  Units units;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch<bf16> small;
    static thread_local Scratch<float> wide;
    TileRegisters registers;
#pragma omp for schedule(dynamic, 1)
    for (int unit = 0; unit < sequences * a->heads; unit++) {
      int s = unit / a->heads, head = unit % a->heads, start = starts[s];
      units.run([&] {
        attend(*a, start, starts[s + 1] - start, head, to, logs + head * rows + start, small, wide);
      });
    }
  }
  return fault_of([&] { units.check(); });
}

int loraplex_train_attend_back(const loraplex::Attending* a, const loraplex::Derivative* d, const int32_t* starts,
                               int sequences, const float* logs, int threads) {
  using namespace loraplex;
  Units units;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch<bf16> small;
    static thread_local Scratch<float> wide;
    TileRegisters registers;
#pragma omp for schedule(dynamic, 1)
    for (int unit = 0; unit < sequences * a->kv_heads; unit++) {
      int s = unit / a->kv_heads, start = starts[s];
      units.run([&] {
        AttendBack(*a, *d, start, starts[s + 1] - start, unit % a->kv_heads, small, wide).run(logs, starts[sequences]);
      });
    }
  }
  return fault_of([&] { units.check(); });
}

int loraplex_train_add_adapters(const loraplex::Changed* y, int threads) {
  return loraplex::fault_of([&] { loraplex::add_adapters(*y, threads); });
}

int loraplex_train_adapters_back(const loraplex::Changed* y, int threads) {
  return loraplex::fault_of([&] { loraplex::AdaptersBack(*y, threads).run(); });
}
#endif

}  // extern "C"
