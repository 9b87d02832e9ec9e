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
  int rows, uses;
  bool joins = false;  // some segments are expanded by the product's units
  std::vector<Run> runs;
  std::vector<LoraUnit> shrink, expand;

  // Whether all rows go through the base's matrix with the same input.
  bool is_whole() const { return runs.size() == 1 && runs[0].merged < 0 && runs[0].part < 0; }

  Product(const Plan& plan, const SlotTable& table, const Fused& fused, int fused_index, int rows, int out, int uses,
          LoraUnits sizes)
      : plan(&plan), fused(fused), fused_index(fused_index), rows(rows), uses(uses),
        shrink(shrink_units(plan, table, fused, uses & (FACTORS | HEAD), sizes)),
        expand(expand_units(plan, fused, uses, sizes)) {
    int begin = 0;
    auto add = [&](int first, int end, int column, int stop, int merged, int part) {
      if (first < end) runs.push_back({{first, end - first, column, stop}, merged, part});
    };
    for (const Segment& segment : plan.segments) {
      joins |= segment.uses & uses && sizes.joined(segment);
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

// The adapters' units of one product in one layer: inputs of `in` elements, outputs `y_stride` apart.
template <class T, class X>
struct AdapterWork {
  const Product& product;
  const SlotTable& table;
  int layer, in;
  float *h, *y;
  size_t y_stride;

  template <class Rows>
  void shrink_unit(int unit, const Rows& x, float* scratch) const {
    shrink<T>(*product.plan, table, product.fused, layer, product.shrink[unit], x, in, h, scratch, ahead(unit));
  }

  void expand_unit(int unit, float* scratch) const {
    expand<T, X>(*product.plan, table, product.fused, layer, product.expand[unit], h, y, y_stride, scratch,
                 ahead(product.shrink.size() + unit));
  }

  // Expands the long segments in what a unit of the product has just written.
  template <class Rows>
  void join(const Tile& tile, const Rows& x, int unit, float* scratch) const {
    if constexpr (TILED<X>) {
      auto part = part_of(tile, x, unit);
      expand_joined<T, X>(*product.plan, table, product.fused, product.uses, layer, part.first_row(tile),
                          part.end_row(tile), part.first_column(tile), part.end_column(tile), h, y, y_stride, scratch);
    }
  }

 private:
  // What the unit after `unit` reads, of `shrink`, then of `expand`: a thread takes adjacent units.
  Ahead ahead(size_t unit) const {
    size_t next = unit + 1, shrinks = product.shrink.size();
    if (next < shrinks) return shrink_ahead<T>(*product.plan, table, product.fused, layer, product.shrink[next], in);
    next -= shrinks;
    if (next >= product.expand.size()) return {};
    return expand_ahead<T>(*product.plan, table, product.fused, layer, product.expand[next]);
  }
};

}  // namespace loraplex
