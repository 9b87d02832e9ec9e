// Threads that are kept for passes: an event to wait for, and a crew of sleeping threads.
//
// A waiting thread spins for a moment and then sleeps. On an idle machine the spin is enough. On a busy one
// the sleep matters: it leaves a core idle, to which the system then moves the thread that was waited for.
#pragma once

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <vector>

namespace loraplex {

// Times for which a waiting thread spins. At the end of a phase: about what a unit of work takes, and far less
// than a time slice. Between two passes: what the host needs to prepare the next one, since a thread that sleeps
// starts late, and often on the processor of the thread that has woken it.
constexpr std::chrono::microseconds SPIN{100}, SPIN_BETWEEN{3000};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `done()`, for at most `time`. Returns whether it is done. In a long wait the processor is left to
// other threads that are ready, such as those that send what the last pass has computed.
template <class Done>
bool spin(Done done, std::chrono::microseconds time = SPIN) {
  constexpr int LOOKS = 16;  // between two looks at the clock
  std::chrono::steady_clock::time_point end{};
  for (int i = 1; !done(); i++) {
    relax();
    if (i % LOOKS) continue;
    auto now = std::chrono::steady_clock::now();
    if (i == LOOKS) end = now + time;
    if (now >= end) return false;
    if (time > SPIN) sched_yield();
  }
  return true;
}

// How long a thread has run since the system gave it a processor. Beside busy programs the system takes the processor
// away after a few milliseconds, at any place. A thread that gives it up before, where it holds no work, holds up no
// other thread while it waits for its next turn. On an idle machine it goes on at once.
class Turn {
 public:
  bool is_over() {
    auto now = std::chrono::steady_clock::now();
    if (now - seen_ > PAUSE) begun_ = now;  // the processor was taken away meanwhile
    seen_ = now;
    return now - begun_ > LENGTH;
  }
  void give_up() {
    sched_yield();
    begun_ = seen_ = std::chrono::steady_clock::now();
  }

 private:
  static constexpr std::chrono::microseconds LENGTH{1000}, PAUSE{2000};  // PAUSE is longer than most phases

  std::chrono::steady_clock::time_point begun_, seen_;
};

// Lets threads wait until a condition on atomic variables holds. Whoever makes it true calls `notify`
// afterwards. Both sides use sequentially consistent accesses: either the waiting thread sees the change,
// or the changing thread sees that somebody sleeps.
class Event {
 public:
  template <class Done>
  void sleep(Done done) {
    while (!done()) {
      sleepers_.fetch_add(1);
      uint32_t seen = changes_.load();
      if (!done()) futex(FUTEX_WAIT_PRIVATE, seen);
      sleepers_.fetch_sub(1);
    }
  }

  // Wakes up to `most` sleeping threads.
  void notify(int most = INT_MAX) {
    if (!sleepers_.load()) return;
    changes_.fetch_add(1);
    futex(FUTEX_WAKE_PRIVATE, most);
  }

 private:
  void futex(int operation, uint32_t value) { syscall(SYS_futex, &changes_, operation, value, nullptr, nullptr, 0); }

  alignas(64) std::atomic<uint32_t> changes_{0};
  std::atomic<uint32_t> sleepers_{0};
};

// The processors that the calling thread may use.
inline int processors() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return INT_MAX;  // more of them than a set holds
  return CPU_COUNT(&allowed);
}

// Threads that run the same function at once: the caller's and some that sleep in between.
//
// `run` opens a round. A thread of the crew runs the function if it wakes before the round is closed, and
// the caller closes the round when its own call ends. A thread is either inside of the function's data or
// outside: it goes outside before it waits, and comes back with `enter`, which fails once the round is closed.
// `run` returns when nobody is inside, so it never waits for a thread that the system has not scheduled
// again after a wait.
class Crew {
 public:
  static constexpr int MOST = 256;

  struct alignas(64) Seat {
    std::atomic<bool> inside{false};
    std::atomic<uint64_t> taken{0};
    int index = 0;  // 0 is the caller's
    uint64_t round = 0;
    Turn turn;
    Crew* crew = nullptr;
    pthread_t thread{};
  };

  // Lends a crew with up to `threads` threads, the caller's included; fewer if the system has no more.
  static Crew* lend(int threads) {
    Crew* crew = nullptr;
    {
      Lent& lent = kept();
      std::lock_guard<std::mutex> lock(lent.mutex);
      if (!lent.free.empty()) {
        crew = lent.free.back();
        lent.free.pop_back();
      }
    }
    if (!crew) crew = new Crew;
    threads = std::min(threads, MOST);
    while (crew->size_ < threads && crew->start()) {
    }
    crew->wanted_ = std::min(threads, crew->size_);
    return crew;
  }

  // Ends a loan. A crew is never freed, since its threads may still be on their way out of the last round.
  static void give_back(Crew* crew) noexcept {
    Lent& lent = kept();
    std::lock_guard<std::mutex> lock(lent.mutex);
    if (lent.free.size() < lent.free.capacity()) lent.free.push_back(crew);  // allocates nothing
  }

  Crew(const Crew&) = delete;

  // Calls `function(argument, seat)` on the calling thread and on those of the crew. It must not throw.
  void run(void (*function)(void*, Seat&), void* argument) {
    function_ = function;
    argument_ = argument;
    round_++;
    note_caller();
    gate_.store(round_ << 16 | uint64_t(wanted_ - 1));
    opened_.notify(wanted_ == size_ ? WOKEN_BY_ONE : INT_MAX);  // a thread that is not wanted wakes no other
    function(argument, seats_[0]);
    gate_.store(round_ << 16);
    progressed.notify();
    for (int i = 1; i < size_; i++)
      while (!spin([&] { return !seats_[i].inside.load(); })) usleep(20);
  }

  // Whether the round of a seat is open. The caller closes it, so for the caller it always is.
  bool is_open(const Seat& seat) const { return !seat.index || gate_.load() == seat.round; }

  void leave(Seat& seat) {
    if (seat.index) seat.inside.store(false, std::memory_order_release);
  }

  // Goes inside again; false if the round is closed.
  bool enter(Seat& seat) {
    if (!seat.index) return true;
    seat.inside.store(true);
    if (gate_.load() == seat.round) return true;
    seat.inside.store(false, std::memory_order_release);
    return false;
  }

  // Waits until `done()`, which becomes true with a `notify` of `event`. The seat must be outside.
  template <class Done>
  void wait(Event& event, Seat& seat, Done done, std::chrono::microseconds time = SPIN) {
    if (spin(done, time)) return;
    event.sleep(done);
  }

  // Threads of a round, the caller's included.
  int threads() const { return wanted_; }

  // What is taken of the range of units of thread `index`.
  std::atomic<uint64_t>& taken(int index) { return seats_[index].taken; }

  // Progress of a round, kept here because threads outside of the round read it.
  alignas(64) std::atomic<uint32_t> phase{0};
  alignas(64) std::atomic<uint32_t> finished{0};
  // Threads outside of the round wait here for `phase`, or until the round is closed.
  Event progressed;

 private:
  // The crews that nobody uses. After a fork the child has none, since their threads are the parent's.
  struct Lent {
    Lent() { free.reserve(1024); }

    std::mutex mutex;
    std::vector<Crew*> free;
  };

  static constexpr int WOKEN_BY_ONE = 2;  // so that waking many threads takes the caller no longer than waking two

  Crew() : seats_(new Seat[MOST]) {}

  static std::atomic<Lent*>& lent() {
    static std::atomic<Lent*> lent = [] {
      pthread_atfork(nullptr, nullptr, [] { Crew::lent().store(new Lent); });
      return new Lent;
    }();
    return lent;
  }

  static Lent& kept() { return *lent().load(); }

  // Adds a thread, which takes no signals: they belong to the threads of Python.
  bool start() {
    seats_[size_].index = size_;
    seats_[size_].crew = this;
    auto main = [](void* given) -> void* {
      auto* seat = static_cast<Seat*>(given);
      seat->crew->serve(*seat);
    };
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    bool started = !pthread_create(&thread, nullptr, main, &seats_[size_]);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!started) return false;
    seats_[size_].thread = thread;
    char name[16];
    snprintf(name, sizeof name, "loraplex %d", size_);
    pthread_setname_np(thread, name);
    pthread_detach(thread);
    size_++;
    return true;
  }

  [[noreturn]] void serve(Seat& seat) {
    for (;;) {
      uint64_t gate = 0;
      wait(opened_, seat, [&] {
        gate = gate_.load();
        return gate != seat.round && int(gate & 0xffff) >= seat.index;
      }, SPIN_BETWEEN);
      opened_.notify(WOKEN_BY_ONE);
      seat.round = gate;
      if (!enter(seat)) continue;
      function_(argument_, seat);
      leave(seat);
    }
  }

  // Keeps the crew's threads off the caller's processor. Linux wakes a thread on the waking one's processor, and
  // may leave both there for seconds although another processor is idle.
  void note_caller() {
    int here = sched_getcpu();
    if (here == caller_processor_) return;
    caller_processor_ = here;
    cpu_set_t set;
    if (here < 0 || here >= CPU_SETSIZE || sched_getaffinity(0, sizeof set, &set)) return;
    CPU_CLR(here, &set);
    if (CPU_COUNT(&set))
      for (int i = 1; i < size_; i++) pthread_setaffinity_np(seats_[i].thread, sizeof set, &set);
  }

  alignas(64) std::atomic<uint64_t> gate_{0};  // round << 16 | threads that may enter; none if it is closed
  Event opened_;
  void (*function_)(void*, Seat&) = nullptr;
  void* argument_ = nullptr;
  int caller_processor_ = -1;  // when a round was last opened
  uint64_t round_ = 0;
  int size_ = 1, wanted_ = 1;
  std::unique_ptr<Seat[]> seats_;
};

}  // namespace loraplex
