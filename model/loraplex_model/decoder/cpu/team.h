// The threads of one pass. A pass is a sequence of phases, and a phase a set of independent units of work.
// Which thread computes a unit never changes the unit's result.
//
// A phase is over when its units are finished, whichever threads did them. A thread that the system has paused
// delays the others only if it holds a unit; if it holds none, they finish the phase and begin the next ones,
// and it passes over those when it runs again.
#pragma once

#include <exception>
#include <stdexcept>
#include <utility>

#include "threads.h"

namespace loraplex {

class Team {
 public:
  // `threads` is the most that compute at once, the caller's included. Throws std::bad_alloc.
  explicit Team(int threads) : crew_(Crew::lend(threads)), share_(8 * std::max(threads, 1)) {}
  ~Team() { Crew::give_back(crew_); }
  Team(const Team&) = delete;

  // Runs `body()` on the calling thread, and at most once on each of the others while that lasts. Returns when
  // no thread reads anything of the body's.
  //
  // `body` calls `run` for every phase, with a counter of its own that starts at 0. Any `run` may end the body by
  // an exception, so what a thread needs for its part of a pass is released by a destructor. Throws what a
  // body or a unit has thrown first; then the pass is not computed. Throws std::logic_error within a pass.
  template <class Body>
  void pass(Body body) {
    if (seat_) throw std::logic_error("a pass cannot be run within another one");
    crew_->progress.store(0);
    crew_->finished.store(0);
    Call<Body> call{*this, body};
    crew_->run([](void* call, Crew::Seat& seat) { static_cast<Call<Body>*>(call)->run(seat); }, &call);
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  // Runs `work(unit)` for every unit in [0, units), and returns when all of them are finished. A thread takes several
  // adjacent units at once, fewer towards the end. So it reads memory in order, and seldom waits for the counter.
  //
  // All threads call it for the same phases in the same order. A late thread does so at any time of the pass, when
  // its `units` has no effect. So only `work` may read what a phase writes, unless it is an atomic variable.
  template <class Work>
  void run(int& phase, int units, Work work) {
    Crew& crew = *crew_;
    uint32_t mine = phase++, count = std::max(units, 0), finished = 0;
    uint64_t progress = crew.progress.load(std::memory_order_acquire);
    if (!count && progress == begin(mine) && crew.progress.compare_exchange_strong(progress, begin(mine + 1)))
      return crew.progressed.notify();
    while (phase_of(progress) == mine && uint32_t(progress) < count) {  // the next unit is the lower half
      uint32_t first = uint32_t(progress), taken = std::max(1u, (count - first) / share_);
      if (!crew.progress.compare_exchange_weak(progress, progress + taken, std::memory_order_acq_rel,
                                               std::memory_order_acquire))
        continue;
      for (uint32_t unit = first; unit < first + taken; unit++) work(int(unit));
      finished += taken;
      progress = crew.progress.load(std::memory_order_acquire);
    }
    if (finished && crew.finished.fetch_add(finished, std::memory_order_acq_rel) + finished == count) {
      crew.finished.store(0, std::memory_order_relaxed);
      crew.progress.store(begin(mine + 1));
      return crew.progressed.notify();
    }
    if (phase_of(progress) == mine) {
      Crew::Seat& seat = *seat_;
      crew.leave(seat);  // from here on, this object may end
      crew.wait(crew.progressed, seat, [&] {
        progress = crew.progress.load();
        return phase_of(progress) != mine || !crew.is_open(seat);
      });
      if (!crew.enter(seat)) throw Stopped();
    }
    if (phase_of(progress) == FAILED) throw Stopped();
  }

  // Number of the calling thread in its pass, from 0; for scratch memory of its own.
  static int index() { return seat_ ? seat_->index : 0; }

 private:
  // Ends a body whose pass is over or has failed.
  struct Stopped {};

  template <class Body>
  struct Call {
    Team& team;
    Body& body;

    void run(Crew::Seat& seat) {
      seat_ = &seat;
      try {
        body();
      } catch (const Stopped&) {
      } catch (...) {
        team.fail(std::current_exception());
      }
      seat_ = nullptr;
    }
  };

  static constexpr uint32_t FAILED = ~0u;

  static uint64_t begin(uint32_t phase) { return uint64_t(phase) << 32; }
  static uint32_t phase_of(uint64_t progress) { return progress >> 32; }

  // The unit that has failed is never finished, so nobody else ends its phase.
  void fail(std::exception_ptr failure) {
    std::lock_guard<std::mutex> lock(failing_);
    if (!failure_) failure_ = std::move(failure);
    crew_->progress.store(begin(FAILED));
    crew_->progressed.notify();
  }

  static inline thread_local Crew::Seat* seat_ = nullptr;

  Crew* crew_;
  uint32_t share_;  // of the units that are left, a thread takes one in so many
  std::mutex failing_;
  std::exception_ptr failure_;
};

}  // namespace loraplex
