// The C interface of the sampler: rows in parallel, each computed by one thread.
#pragma once

#include <atomic>
#include <new>

#include "scores.h"

namespace loraplex::sampling {

// Calls `work(row, scratch, ends)` for every row. Returns whether there was memory for all of them.
template <class Work>
inline bool each_row(int rows, int vocab, int threads, Work work) {
  std::atomic<bool> fits{true};
#pragma omp parallel for num_threads(std::max(1, std::min(threads, rows))) schedule(dynamic, 1)
  for (int row = 0; row < rows; row++) {
    thread_local Scratch scratch;
    thread_local std::vector<double> ends;
    try {
      scratch.fit(vocab);
      work(row, scratch, ends);
    } catch (const std::bad_alloc&) {
      fits = false;
    }
  }
  return fits;
}

}  // namespace loraplex::sampling

extern "C" {

int loraplex_draw_size() { return sizeof(loraplex::sampling::Draw); }

// Row r takes its logits from line `lines[r]` of `logits` [][vocab]. Returns whether all tokens were chosen.
int loraplex_choose(const float* logits, int vocab, const int32_t* lines, const loraplex::sampling::Draw* const* draws,
                    int rows, int32_t* tokens, int threads) {
  return loraplex::sampling::each_row(rows, vocab, threads, [&](int row, auto& scratch, auto& ends) {
    tokens[row] =
        loraplex::sampling::choose(*draws[row], logits + size_t(lines[row]) * vocab, vocab, scratch, ends);
  });
}

// `ids` and `values` are [rows][most]; of row r the first `counts[r]` are written.
int loraplex_score(const float* logits, int vocab, const int32_t* lines, const int32_t* tokens,
                   const int32_t* counts, int rows, int most, float* chosen, int32_t* ids, float* values,
                   int threads) {
  return loraplex::sampling::each_row(rows, vocab, threads, [&](int row, auto& scratch, auto&) {
    size_t at = size_t(row) * most;
    loraplex::sampling::score(logits + size_t(lines[row]) * vocab, vocab, tokens[row], counts[row], scratch,
                              chosen + row, ids + at, values + at);
  });
}

// Which lines of `logits` [rows][vocab] are finite.
void loraplex_finite(const float* logits, int vocab, int rows, int32_t* finite, int threads) {
#pragma omp parallel for num_threads(std::max(1, std::min(threads, rows))) schedule(static)
  for (int row = 0; row < rows; row++) {
    float most = loraplex::sampling::largest_finite(logits + size_t(row) * vocab, vocab);
    finite[row] = most == most;
  }
}

}  // extern "C"
