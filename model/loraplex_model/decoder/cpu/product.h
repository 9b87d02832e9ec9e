// The matrix products of a pass: which rows go through which matrix, and the adapters' units around them.
#pragma once

#include <vector>

#include "lora.h"

namespace loraplex {

// The plan of one matrix product with the adapters' changes. It is the same in every layer.
struct Product {
  // Rows that go through one matrix with one input. Base rows and rows of most adapters share a run; rows
  // with dense matrices of their own have another, and rows with scaled inputs one for each projection.
  struct Run {
    Tile tile;
    int merged;  // slot whose dense matrix replaces the base's, or -1
    int part;    // projection whose input is scaled, or -1
  };

  const Plan* plan;
  Fused fused;
  int fused_index;  // FusedMatrix; -1 for the head, which has no dense copies
  int rows;
  std::vector<Run> runs;
  std::vector<LoraUnit> shrink, expand;

  Product(const Plan& plan, const SlotTable& table, const Fused& fused, int fused_index, int rows, int out, int uses, int unit_rows)
      : plan(&plan), fused(fused), fused_index(fused_index), rows(rows), 
        shrink(shrink_units(plan, table, fused, uses & (FACTORS | HEAD), unit_rows)),
        expand(expand_units(plan, fused, uses, unit_rows)) {
    int begin = 0;
    auto add = [&](int first, int end, int column, int stop, int merged, int part) {
      if (first < end) runs.push_back({{first, end - first, column, stop}, merged, part});
    };
    for (const Segment& segment : plan.segments) {
      bool scaled = segment.uses & uses & IN_GAIN, dense = segment.merged >= 0 && fused_index >= 0;
      if (!dense && !scaled) continue;
      add(begin, segment.first, 0, out, -1, -1);
      begin = segment.end;
      if (dense) add(segment.first, segment.end, 0, out, segment.merged, -1);
      else
        for (int p = 0; p < fused.parts; p++)
          add(segment.first, segment.end, fused.column[p], fused.column[p] + fused.width[p], -1, p);
    }
    add(begin, rows, 0, out, -1, -1);
  }
};

}  // namespace loraplex
