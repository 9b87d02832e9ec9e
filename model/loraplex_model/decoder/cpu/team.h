// The threads of one pass. A pass is a sequence of phases, and a phase a set of independent units of work.
// Which thread computes a unit never changes the unit's result.
//
// A phase is over when its units are finished, whichever threads did them. A thread that the system has paused
// delays the others only if it holds a unit; if it holds none, they finish the phase and begin the next ones,
// and it passes over those when it runs again. So each thread lets the system pause it between two phases, often.
#pragma once

#include <exception>
#include <stdexcept>
#include <utility>

#include "threads.h"

namespace loraplex {

class Team {
 public:
  // `threads` is the most that compute at once, the caller's included. Throws std::bad_alloc.
  explicit Team(int threads) : crew_(Crew::lend(threads)), ranges_(crew_->threads()) {}
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
    crew_->phase.store(0);
    crew_->finished.store(0);
    for (uint32_t i = 0; i < ranges_; i++) crew_->taken(i).store(0);
    Call<Body> call{*this, body};
    crew_->run([](void* call, Crew::Seat& seat) { static_cast<Call<Body>*>(call)->run(seat); }, &call);
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  // Runs `work(unit)` for every unit in [0, units), and returns when all of them are finished. The units are divided
  // into a range of adjacent ones for each thread, which takes them in order; so it reads memory in order, and what
  // it counts is in its own cache. A thread whose range is done goes on with what is left of the others'.
  //
  // All threads call it for the same phases in the same order. A late thread does so at any time of the pass, when
  // its `units` has no effect. So only `work` may read what a phase writes, unless it is an atomic variable.
  template <class Work>
  void run(int& phase, int units, Work work) {
    Crew& crew = *crew_;
    if (seat_->turn.is_over()) end_turn();
    uint32_t mine = phase++, count = std::max(units, 0), finished = 0, now = crew.phase.load();
    if (!count && now == mine && crew.phase.compare_exchange_strong(now, mine + 1)) return crew.progressed.notify();
    if (now == mine)
      for (uint32_t i = 0; i < ranges_; i++) finished += take((index() + i) % ranges_, mine, count, work);
    if (finished && crew.finished.fetch_add(finished, std::memory_order_acq_rel) + finished == count) {
      crew.finished.store(0, std::memory_order_relaxed);
      crew.phase.store(mine + 1);
      return crew.progressed.notify();
    }
    now = crew.phase.load();
    if (now == mine) {
      Crew::Seat& seat = *seat_;
      crew.leave(seat);  // from here on, this object may end
      crew.wait(crew.progressed, seat, [&] {
        now = crew.phase.load();
        return now != mine || !crew.is_open(seat);
      });
      if (!crew.enter(seat)) throw Stopped();
    }
    if (now == FAILED) throw Stopped();
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

  // Runs the units of a thread's range that nobody has taken yet, and returns their number. What is taken is counted
  // with the number of its phase, so that a late thread finds nothing to take in a phase that is over.
  template <class Work>
  uint32_t take(uint32_t range, uint32_t mine, uint32_t count, Work& work) {
    std::atomic<uint64_t>& taken = crew_->taken(range);
    auto begin = [&](uint64_t range) { return uint32_t((range * count + ranges_ - 1) / ranges_); };
    uint32_t first = begin(range), end = begin(range + 1), finished = 0;
    for (uint64_t seen = taken.load(std::memory_order_relaxed);;) {
      uint32_t phase = seen >> 32, next = phase == mine ? uint32_t(seen) : 0;
      if (phase > mine || first + next >= end) return finished;
      if (!taken.compare_exchange_weak(seen, uint64_t(mine) << 32 | (next + 1), std::memory_order_acq_rel,
                                       std::memory_order_relaxed))
        continue;
      work(int(first + next));
      finished++;
      seen = uint64_t(mine) << 32 | (next + 1);
    }
  }

  // Gives up the processor while the calling thread holds no unit.
  void end_turn() {
    Crew& crew = *crew_;
    Crew::Seat& seat = *seat_;
    crew.leave(seat);  // from here on, this object may end
    seat.turn.give_up();
    if (!crew.enter(seat)) throw Stopped();
  }

  // The unit that has failed is never finished, so nobody else ends its phase.
  void fail(std::exception_ptr failure) {
    std::lock_guard<std::mutex> lock(failing_);
    if (!failure_) failure_ = std::move(failure);
    crew_->phase.store(FAILED);
    crew_->progressed.notify();
  }

  static inline thread_local Crew::Seat* seat_ = nullptr;

  Crew* crew_;
  uint32_t ranges_;  // one for each thread
  std::mutex failing_;
  std::exception_ptr failure_;
};

}  // namespace loraplex
