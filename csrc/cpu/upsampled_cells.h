// Rows of cells and blocks of pixels of upsampled logits: loading, interpolation, and the reverse, for one instruction
// level. upsampled_logits.h describes the pieces of work.
#pragma once

#include "memory.h"
#include "transpose.h"
#include "upsampled_logits.h"

namespace annnet::ANNNET_LEVEL {

namespace upsampled {

ANNNET_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of pixels that are made together: their operations are independent and fill the pipelines.
constexpr int kRows = 4;

// ---- rows of cells: memory ↔ (width, padded) accumulators, the classes of a cell next to each other ----

template <class A>
constexpr int64_t padded(int64_t classes) {
  return (classes + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// What lies beyond the classes is 0.
template <class T>
void load_cells(const UpsampledArgs& args, int64_t image, int64_t row, Acc<T>* target) {
  constexpr int64_t kWidth = kLanes<T>;
  const int64_t stride = padded<Acc<T>>(args.classes);
  const UpsampledCells& map = args.logits;
  const T* const source = static_cast<const T*>(map.data) + image * map.batch + row * map.row;
  for (int64_t x = 0; x < args.width; x += kWidth)
    for (int64_t k = 0; k < args.classes; k += kWidth) {
      const int64_t cells = least(kWidth, args.width - x), classes = least(kWidth, args.classes - k);
      const T* const first = source + x * map.column + k * map.channel;
      Vec<T> rows[kWidth] = {};
      if (map.channel == 1) {
        for (int64_t i = 0; i < cells; ++i) rows[i] = load_lanes(first + i * map.column, 1, classes);
      } else {
        for (int64_t i = 0; i < classes; ++i) rows[i] = load_lanes(first + i * map.channel, map.column, cells);
        transpose(rows);
      }
      for (int64_t i = 0; i < cells; ++i) store(target + (x + i) * stride + k, rows[i]);
    }
}

// The row of the gradient, which it replaces or is added to.
template <class A, bool kAdd>
void store_cells(const UpsampledArgs& args, int64_t image, int64_t row, const A* source) {
  constexpr int64_t kWidth = kLanes<A>;
  const int64_t stride = padded<A>(args.classes);
  const UpsampledCells& map = args.gradient;
  A* const target = static_cast<A*>(map.data) + image * map.batch + row * map.row;
  for (int64_t x = 0; x < args.width; x += kWidth)
    for (int64_t k = 0; k < args.classes; k += kWidth) {
      const int64_t cells = least(kWidth, args.width - x), classes = least(kWidth, args.classes - k);
      A* const first = target + x * map.column + k * map.channel;
      Vec<A> rows[kWidth] = {};
      for (int64_t i = 0; i < cells; ++i) rows[i] = load(source + (x + i) * stride + k);
      const bool by_cell = map.channel == 1;
      if (!by_cell) transpose(rows);
      const int64_t lines = by_cell ? cells : classes, count = by_cell ? classes : cells;
      const int64_t to_next = by_cell ? map.column : map.channel, step = by_cell ? 1 : map.column;
      for (int64_t i = 0; i < lines; ++i) {
        A* const place = first + i * to_next;
        store_lanes(place, step, kAdd ? rows[i] + load_lanes(place, step, count) : rows[i], count);
      }
    }
}

// ---- blocks: as many columns of pixels as a vector has lanes, from one row of cells to the next ----

template <class A>
struct Block {
  int64_t first, count;    // columns
  int64_t low[kLanes<A>];  // offsets of the cells to both sides of each column, the last one's repeated
  int64_t high[kLanes<A>];
  A weight[kLanes<A>];

  Block(const UpsampledArgs& args, int64_t first) : first(first), count(least(kLanes<A>, args.columns - first)) {
    const int64_t stride = padded<A>(args.classes);
    for (int64_t i = 0; i < kLanes<A>; ++i) {
      const UpsampledLine& line = args.column_lines[first + least(i, count - 1)];
      low[i] = line.low * stride;
      high[i] = line.high * stride;
      weight[i] = static_cast<A>(line.weight);
    }
  }

  // One vector of classes of a row of cells, interpolated: rows of classes, lanes of columns.
  ANNNET_INLINE void spread(const A* cells, Vec<A> (&rows)[kLanes<A>]) const {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) {
      const Vec<A> left = load(cells + low[i]);
      rows[i] = left + weight[i] * (load(cells + high[i]) - left);
    }
    transpose(rows);
  }

  // The reverse: rows of classes are added to the cells.
  ANNNET_INLINE void gather(A* cells, Vec<A> (&rows)[kLanes<A>]) const {
    transpose(rows);
    Vec<A> left = {}, right = {};
    for (int64_t i = 0; i < count; ++i) {
      left += (1 - weight[i]) * rows[i];
      right += weight[i] * rows[i];
      if (i + 1 < count && low[i + 1] == low[i]) continue;
      store(cells + low[i], load(cells + low[i]) + left);
      store(cells + high[i], load(cells + high[i]) + right);
      left = right = Vec<A>{};
    }
  }
};

// The scratch of a unit.
template <class A>
struct Scratch {
  Scratch(const UpsampledArgs& args, void* memory) : classes(args.classes), stride(padded<A>(args.classes)) {
    A* next = static_cast<A*>(memory);
    const auto take = [&](int64_t count) {
      A* const taken = next;
      next += count;
      return taken;
    };
    row_size = stride * args.width;
    above = take(row_size);
    below = take(row_size);
    gradient_above = take(row_size);
    gradient_below = take(row_size);
    top = take(stride * kLanes<A>);
    difference = take(stride * kLanes<A>);
    gradient_top = take(stride * kLanes<A>);
    gradient_bottom = take(stride * kLanes<A>);
    values = take(stride * kLanes<A> * kRows);
  }

  // Columns of a block, interpolated in both rows of cells.
  void spread(const Block<A>& block) {
    for (int64_t k = 0; k < stride; k += kLanes<A>) {
      Vec<A> upper[kLanes<A>], lower[kLanes<A>];
      block.spread(above + k, upper);
      block.spread(below + k, lower);
      for (int i = 0; i < kLanes<A>; ++i) {
        store(top + (k + i) * kLanes<A>, upper[i]);
        store(difference + (k + i) * kLanes<A>, lower[i] - upper[i]);
      }
    }
  }

  void gather(const Block<A>& block) {
    for (int64_t k = 0; k < stride; k += kLanes<A>) {
      Vec<A> upper[kLanes<A>], lower[kLanes<A>];
      for (int i = 0; i < kLanes<A>; ++i) {
        upper[i] = load(gradient_top + (k + i) * kLanes<A>);
        lower[i] = load(gradient_bottom + (k + i) * kLanes<A>);
      }
      block.gather(gradient_above + k, upper);
      block.gather(gradient_below + k, lower);
    }
  }

  // The next row of cells becomes the lower one.
  template <class T>
  void next_row(const UpsampledArgs& args, int64_t image, int64_t row) {
    A* const free = above;
    above = below;
    below = free;
    load_cells<T>(args, image, row, below);
  }

  int64_t classes, stride, row_size;
  A *above, *below, *gradient_above, *gradient_below;
  A *top, *difference, *gradient_top, *gradient_bottom;  // (padded classes, lanes)
  A* values;                                             // (classes, rows, lanes)
};

}  // namespace upsampled

}  // namespace annnet::ANNNET_LEVEL
