// The memory of the rows that matrix products read, in the type X in which they are multiplied.
//
// float: the rows themselves. bfloat16: a rounded copy in the form of parts.h, which whoever computes a
// row's elements writes beside them.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "matmul_bf16.h"

namespace loraplex {

// Memory that grows to the size of the largest pass and is reused by later ones. Not initialised; begins at
// a cache line. Large memory asks for large pages, since products write many rows that lie far apart.
template <class T>
class Memory {
 public:
  T* data() { return elements_.get(); }
  void reserve(size_t size) {
    if (size <= size_) return;
    constexpr size_t LARGE_PAGE = 1 << 21;
    size_t bytes = size * sizeof(T), unit = bytes < LARGE_PAGE ? 64 : LARGE_PAGE;
    bytes = (bytes + unit - 1) / unit * unit;
    elements_.reset(static_cast<T*>(std::aligned_alloc(unit, bytes)));
    size_ = elements_ ? size : 0;
    if (!elements_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (unit == LARGE_PAGE) madvise(elements_.get(), bytes, MADV_HUGEPAGE);
#endif
  }

 private:
  struct Free {
    void operator()(T* elements) const { std::free(elements); }
  };
  std::unique_ptr<T, Free> elements_;
  size_t size_ = 0;
};
using Buffer = Memory<float>;

// Rows of bfloat16 for products. Nothing in libraries without such products.
class InputRows {
 public:
#if LORAPLEX_ORDER
  void reserve(int rows, int width) {
    width_ = width;
    for (columns_ = 1; columns_ < std::min(rows, TILE_ROWS);) columns_ *= 2;
    rows_.reserve(Blocked::size(rows, width));
  }
  Inputs get() { return get(width_); }
  // The memory for rows of another width, for which there must be room.
  Inputs get(int width) { return {{rows_.data(), width}, rows_.data(), columns_}; }
  void put(int t, int first, int count, const float* x) { get().put(t, first, count, x); }

 private:
  int width_ = 0, columns_ = TILE_ROWS;
  Memory<bf16> rows_;
#endif
};

// What a product reads: rows of type X.
template <class X>
struct Multiplied;

template <>
struct Multiplied<float> {
  struct Registers {
    Registers() {}
  };
  using Rows = const float*;
  static void reserve(InputRows&, int, int) {}
  static void put(InputRows&, int, int, int, const float*) {}
  static void put_row(InputRows&, int, int, const float*) {}
  static Rows rows(const float* x, InputRows&, int = 0) { return x; }
  static void put_group(InputRows&, int, int, int, int, const float*, size_t) {}
};

#if LORAPLEX_ORDER
template <>
struct Multiplied<bf16> {
  using Registers = TileRegisters;
  using Rows = Inputs;
  static void reserve(InputRows& inputs, int rows, int width) { inputs.reserve(rows, width); }
  static void put(InputRows& inputs, int t, int first, int count, const float* x) { inputs.put(t, first, count, x); }
  static void put_row(InputRows& inputs, int t, int width, const float* x) { inputs.get(width).put(t, 0, width, x); }
  static Rows rows(const float*, InputRows& inputs) { return inputs.get(); }
  static Rows rows(const float*, InputRows& inputs, int width) { return inputs.get(width); }
  static void put_group(InputRows& inputs, int t, int used, int first, int count, const float* x, size_t stride) {
    inputs.get().put_group(t, used, first, count, x, stride);
  }
};
#endif

}  // namespace loraplex
