// Memory of the threads, and what becomes of an allocation that fails in a parallel region, which no exception
// may leave.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "../bounds.h"

namespace loraplex {

// Memory of a thread that grows and is kept, aligned for tiles. Not cleared.
template <class T>
class Scratch {
 public:
  T* of(size_t count) {
    if (count > size_) {
      size_ = 0;
      memory_.reset();  // before the larger one, so that both never exist
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
  size_t size_ = 0;
};

// Units of work of a parallel region, which all threads may run. Once an allocation has failed, further units are
// left out; after the region `check` throws.
class Units {
 public:
  template <class F>
  void run(F unit) noexcept {
    if (failed_) return;
    try {
      unit();
    } catch (const std::bad_alloc&) {
      failed_ = true;
    }
  }
  void check() const {
    if (failed_) throw std::bad_alloc();
  }

 private:
  std::atomic<bool> failed_{false};
};

// Calls f. Returns a Fault for the C interface.
template <class F>
inline int fault_of(F f) noexcept {
  try {
    f();
    return NO_FAULT;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}

}  // namespace loraplex
