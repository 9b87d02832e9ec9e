// The threads of one pass. A pass is a sequence of phases; within a phase the threads take the next unit of
// work from a shared counter, so that a thread which the system has paused delays one unit only.
// Which thread computes a unit never changes the unit's result.
#pragma once

#include <omp.h>

#include <atomic>
#include <memory>

namespace loraplex {

class Team {
 public:
  explicit Team(int phases) : counters_(new Counter[phases]) {}

  // Runs `work(unit)` for every unit in [0, units), then waits for all threads. Every thread of the parallel
  // region must call it, with the phases in the same order; `phase` is the thread's own counter.
  template <class Work>
  void run(int& phase, int units, Work work) {
    std::atomic<int>& next = counters_[phase++].value;
    for (int unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) work(unit);
#pragma omp barrier
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };
  std::unique_ptr<Counter[]> counters_;
};

}  // namespace loraplex
