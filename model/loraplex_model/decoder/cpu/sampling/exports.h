// The C interface of the sampler: rows in parallel, each computed by one thread.
#pragma once

#include <algorithm>
#include <new>
#include <vector>

#include "../team.h"
#include "scores.h"

namespace loraplex::sampling {

// Calls `work(row)` for every row, on the threads that also compute passes: others would compete with them for
// the processors. Returns whether there was memory for all rows.
template <class Work>
inline bool each_row(int rows, int threads, Work work) {
  try {
    Team team(std::max(1, std::min(threads, rows)));
    team.pass([&] {
      int phase = 0;
      team.run(phase, rows, work);
    });
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// The memory of the calling thread for a row.
inline Scratch& scratch_of(int vocab) {
  thread_local Scratch scratch;
  scratch.fit(vocab);
  return scratch;
}

}  // namespace loraplex::sampling

extern "C" {

int loraplex_draw_size() { return sizeof(loraplex::sampling::Draw); }

// Row r takes its logits from line `lines[r]` of `logits` [][vocab]. Returns whether all tokens were chosen.
int loraplex_choose(const float* logits, int vocab, const int32_t* lines, const loraplex::sampling::Draw* const* draws,
                    int rows, int32_t* tokens, int threads) {
  using namespace loraplex::sampling;
  return each_row(rows, threads, [&](int row) {
    thread_local std::vector<double> ends;
    tokens[row] = choose(*draws[row], logits + size_t(lines[row]) * vocab, vocab, scratch_of(vocab), ends);
  });
}

// `ids` and `values` are [rows][most]; of row r the first `counts[r]` are written.
int loraplex_score(const float* logits, int vocab, const int32_t* lines, const int32_t* tokens,
                   const int32_t* counts, int rows, int most, float* chosen, int32_t* ids, float* values,
                   int threads) {
  using namespace loraplex::sampling;
  return each_row(rows, threads, [&](int row) {
    size_t at = size_t(row) * most;
    score(logits + size_t(lines[row]) * vocab, vocab, tokens[row], counts[row], scratch_of(vocab), chosen + row,
          ids + at, values + at);
  });
}

// Which lines of `logits` [rows][vocab] are finite.
void loraplex_finite(const float* logits, int vocab, int rows, int32_t* finite, int threads) {
  loraplex::sampling::each_row(rows, threads, [&](int row) {
    float most = loraplex::sampling::largest_finite(logits + size_t(row) * vocab, vocab);
    finite[row] = most == most;
  });
}

}  // extern "C"
