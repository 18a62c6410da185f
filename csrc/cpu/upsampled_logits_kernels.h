// Cross-entropy, its gradient, and argmax of upsampled logits for one instruction level; upsampled_logits.h describes
// the pieces of work.
#pragma once

#include "upsampled_cells.h"
#include "vector_exp.h"
#include "vector_log.h"

namespace annnet::ANNNET_LEVEL {

namespace upsampled {

// ---- the cross-entropy of some rows of a block ----

// What the pixels of a block have in common, and what they add up to.
template <class A>
struct Criterion {
  explicit Criterion(const UpsampledArgs& args)
      : weight(static_cast<const A*>(args.weight)),
        label_share(static_cast<A>(1 - args.smoothing)),
        class_share(static_cast<A>(args.smoothing / static_cast<double>(args.classes))) {
    double total = 0;
    for (int64_t k = 0; k < args.classes; ++k) total += weight == nullptr ? 1 : static_cast<double>(weight[k]);
    of_all_classes = static_cast<A>(total) * class_share;
  }
  ANNNET_INLINE A weight_of(int64_t k) const { return weight == nullptr ? 1 : weight[k]; }

  const A* weight;
  A label_share, class_share, of_all_classes;
  Vec<A> losses = {}, weights = {};
};

// The labels of the pixels of a block in one row.
template <class A>
struct Labels {
  void read(const UpsampledArgs& args, int64_t image, int64_t row, const Block<A>& block, UpsampledSums& sums) {
    const UpsampledPixels& map = args.target;
    const int64_t offset = image * map.batch + row * map.row + block.first * map.column;
    if (args.label_type == kInt64)
      read_as(static_cast<const int64_t*>(map.data) + offset, args, block.count, sums);
    else if (args.label_type == kInt32)
      read_as(static_cast<const int32_t*>(map.data) + offset, args, block.count, sums);
    else
      read_as(static_cast<const uint8_t*>(map.data) + offset, args, block.count, sums);
  }

  template <class Label>
  ANNNET_INLINE void read_as(const Label* source, const UpsampledArgs& args, int64_t count, UpsampledSums& sums) {
    const A* const weights = static_cast<const A*>(args.weight);
    for (int64_t i = 0; i < kLanes<A>; ++i) {
      of[i] = -1;
      weight[i] = counts[i] = 0;
      if (i >= count) continue;
      const int64_t label = source[i * args.target.column];
      if (label == args.ignore_index) continue;
      if (label < 0 || label >= args.classes) {
        if (!sums.has_wrong_label) sums.wrong_label = label;
        sums.has_wrong_label = true;
        continue;
      }
      of[i] = label;
      counts[i] = 1;
      weight[i] = weights == nullptr ? 1 : weights[label];
    }
  }

  int64_t of[kLanes<A>];  // -1 where a pixel does not count
  A weight[kLanes<A>];
  A counts[kLanes<A>];
};

// Logits of R rows, and the largest of each pixel.
template <int R, class A>
ANNNET_INLINE void interpolate(const Scratch<A>& scratch, const A* weight, Vec<A> (&largest)[R]) {
  for (int r = 0; r < R; ++r) largest[r] = Vec<A>{} - static_cast<A>(INFINITY);
  for (int64_t k = 0; k < scratch.classes; ++k) {
    const Vec<A> top = load(scratch.top + k * kLanes<A>), difference = load(scratch.difference + k * kLanes<A>);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<A> value = top + weight[r] * difference;
      store(scratch.values + (k * R + r) * kLanes<A>, value);
      largest[r] = value > largest[r] ? value : largest[r];
    }
  }
}

// In place: values become powers of their difference to the largest. `smooth` gets Σ weight · (largest − value).
template <int R, bool kSmoothing, class A>
ANNNET_INLINE void exponentiate(const Scratch<A>& scratch, const Criterion<A>& criterion, const Vec<A> (&largest)[R],
                                Vec<A> (&sum)[R], Vec<A> (&smooth)[R]) {
  constexpr A kLog2e = static_cast<A>(0x1.71547652b82fep+0);
  for (int r = 0; r < R; ++r) sum[r] = smooth[r] = Vec<A>{};
  for (int64_t k = 0; k < scratch.classes; ++k) {
    A* const place = scratch.values + k * R * kLanes<A>;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<A> below = load(place + r * kLanes<A>) - largest[r];
      if constexpr (kSmoothing) smooth[r] -= criterion.weight_of(k) * below;
      const Vec<A> power = exp2_of_negative(below * kLog2e);
      store(place + r * kLanes<A>, power);
      sum[r] += power;
    }
  }
}

// Adds the gradient of R rows to that of the columns in both rows of cells: Σ value · upper, Σ value · lower.
template <int R, class A>
ANNNET_INLINE void collect(const Scratch<A>& scratch, const Vec<A> (&upper)[R], const Vec<A> (&lower)[R]) {
  for (int64_t k = 0; k < scratch.classes; ++k) {
    A *const top = scratch.gradient_top + k * kLanes<A>, *const bottom = scratch.gradient_bottom + k * kLanes<A>;
    Vec<A> to_top = load(top), to_bottom = load(bottom);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<A> value = load(scratch.values + (k * R + r) * kLanes<A>);
      to_top += value * upper[r];
      to_bottom += value * lower[r];
    }
    store(top, to_top);
    store(bottom, to_bottom);
  }
}

// R rows of pixels from `row` on.
template <int R, class A>
void cross_entropy_of_rows(const UpsampledArgs& args, int64_t image, int64_t row, const Block<A>& block,
                           const Scratch<A>& scratch, Criterion<A>& criterion, UpsampledSums& sums) {
  A weight[R], at_label[R][kLanes<A>] = {};
  for (int r = 0; r < R; ++r) weight[r] = static_cast<A>(args.row_lines[row + r].weight);
  Vec<A> largest[R], sum[R], smooth[R];
  interpolate<R>(scratch, weight, largest);
  const auto place = [&](int64_t label, int r) { return scratch.values + (label * R + r) * kLanes<A>; };
  Labels<A> labels[R];
  for (int r = 0; r < R; ++r) labels[r].read(args, image, row + r, block, sums);
  for (int r = 0; r < R; ++r)
    for (int64_t i = 0; i < kLanes<A>; ++i)
      if (labels[r].of[i] >= 0) at_label[r][i] = place(labels[r].of[i], r)[i];
  const bool smoothing = args.smoothing > 0;
  if (smoothing)
    exponentiate<R, true>(scratch, criterion, largest, sum, smooth);
  else
    exponentiate<R, false>(scratch, criterion, largest, sum, smooth);

  for (int r = 0; r < R; ++r) {
    const Vec<A> counts = load(labels[r].counts), of_label = load(labels[r].weight);
    const Vec<A> log_sum = log_of_normal(sum[r]);
    Vec<A> loss = criterion.label_share * of_label * ((largest[r] - load(at_label[r])) + log_sum);
    if (smoothing) loss += criterion.of_all_classes * log_sum + criterion.class_share * smooth[r];
    loss = counts == 0 ? Vec<A>{} : loss;
    criterion.losses += loss;
    criterion.weights += of_label;
    if (args.losses != nullptr) {
      A* const target = static_cast<A*>(args.losses) + (image * args.rows + row + r) * args.columns + block.first;
      store_lanes(target, 1, loss, block.count);
    }
  }
  if (args.gradient.data == nullptr) return;

  Vec<A> upper[R], lower[R], even_top = {}, even_bottom = {};
  for (int r = 0; r < R; ++r) {
    Vec<A> upstream = load(labels[r].counts);
    if (args.grad.data != nullptr) {
      const UpsampledPixels& map = args.grad;
      const A* const source =
          static_cast<const A*>(map.data) + image * map.batch + (row + r) * map.row + block.first * map.column;
      upstream = upstream == 0 ? Vec<A>{} : load_lanes(source, map.column, block.count);
    }
    const Vec<A> of_label = criterion.label_share * load(labels[r].weight);
    const Vec<A> of_all = of_label + criterion.of_all_classes;
    const Vec<A> factor = load(labels[r].counts) == 0 ? Vec<A>{} : upstream * of_all / sum[r];
    upper[r] = factor * (1 - weight[r]);
    lower[r] = factor * weight[r];
    // Taken off the power of the label, which is about as large where the label is likely.
    const Vec<A> taken = smoothing ? (of_all == 0 ? Vec<A>{} : sum[r] * (of_label / of_all)) : sum[r];
    for (int64_t i = 0; i < kLanes<A>; ++i)
      if (labels[r].of[i] >= 0) place(labels[r].of[i], r)[i] -= taken[i];
    even_top += upstream * (criterion.class_share * (1 - weight[r]));
    even_bottom += upstream * (criterion.class_share * weight[r]);
  }
  collect<R>(scratch, upper, lower);
  if (!smoothing) return;
  for (int64_t k = 0; k < scratch.classes; ++k) {
    A *const top = scratch.gradient_top + k * kLanes<A>, *const bottom = scratch.gradient_bottom + k * kLanes<A>;
    store(top, load(top) - criterion.weight_of(k) * even_top);
    store(bottom, load(bottom) - criterion.weight_of(k) * even_bottom);
  }
}

template <int R>
struct RowCount {
  static constexpr int value = R;
};

// Calls body(RowCount, row) for groups of up to kRows of the rows first … last - 1.
template <class Body>
ANNNET_INLINE void for_rows(int64_t first, int64_t last, const Body& body) {
  for (; first + kRows <= last; first += kRows) body(RowCount<kRows>{}, first);
  for (; first + 2 <= last; first += 2) body(RowCount<2>{}, first);
  if (first < last) body(RowCount<1>{}, first);
}

// Calls body(row of cells) for the rows of a unit, each with the one below it in the scratch.
template <class T, class Body>
ANNNET_INLINE void for_cell_rows(const UpsampledArgs& args, UpsampledUnit unit, Scratch<Acc<T>>& scratch,
                                 const Body& body) {
  load_cells<T>(args, unit.image, unit.first, scratch.below);
  for (int64_t row = unit.first; row < unit.last; ++row) {
    scratch.template next_row<T>(args, unit.image, least(row + 1, args.height - 1));
    body(row);
  }
}

template <class T>
void cross_entropy(const UpsampledArgs& args, UpsampledUnit unit, void* memory, void* border, UpsampledSums* sums) {
  using A = Acc<T>;
  Scratch<A> scratch(args, memory);
  Criterion<A> criterion(args);
  const bool gradient = args.gradient.data != nullptr;
  if (gradient) memset(scratch.gradient_below, 0, scratch.row_size * sizeof(A));
  *sums = {};
  for_cell_rows<T>(args, unit, scratch, [&](int64_t row) {
    A* const free = scratch.gradient_above;
    scratch.gradient_above = scratch.gradient_below;
    scratch.gradient_below = free;
    if (gradient) memset(free, 0, scratch.row_size * sizeof(A));
    const int64_t first = args.first_row[row], last = args.first_row[row + 1];
    for (int64_t column = 0; first < last && column < args.columns; column += kLanes<A>) {
      const Block<A> block(args, column);
      scratch.spread(block);
      if (gradient) {
        memset(scratch.gradient_top, 0, scratch.stride * kLanes<A> * sizeof(A));
        memset(scratch.gradient_bottom, 0, scratch.stride * kLanes<A> * sizeof(A));
      }
      for_rows(first, last, [&](auto rows, int64_t pixel_row) {
        cross_entropy_of_rows<rows.value>(args, unit.image, pixel_row, block, scratch, criterion, *sums);
      });
      if (gradient) scratch.gather(block);
      sums->loss += sum_lanes(criterion.losses);
      sums->weight += sum_lanes(criterion.weights);
      criterion.losses = criterion.weights = Vec<A>{};
    }
    if (gradient) store_cells<A, false>(args, unit.image, row, scratch.gradient_above);
  });
  if (gradient) memcpy(border, scratch.gradient_below, scratch.row_size * sizeof(A));
}

template <class T>
void add_border(const UpsampledArgs& args, UpsampledUnit unit, const void* border) {
  store_cells<Acc<T>, true>(args, unit.image, unit.last, static_cast<const Acc<T>*>(border));
}

// ---- argmax ----

// The largest logit wins, the first of several; NaN is larger than all, as in PyTorch.
template <int R, class A>
void argmax_of_rows(const UpsampledArgs& args, int64_t image, int64_t row, const Block<A>& block,
                    const Scratch<A>& scratch) {
  using Integers = typename Exp2Constants<Vec<A>>::Integers;
  A weight[R];
  Vec<A> largest[R];
  Integers index[R];
  for (int r = 0; r < R; ++r) {
    weight[r] = static_cast<A>(args.row_lines[row + r].weight);
    largest[r] = load(scratch.top) + weight[r] * load(scratch.difference);
    index[r] = Integers{};
  }
  for (int64_t k = 1; k < scratch.classes; ++k) {
    const Vec<A> top = load(scratch.top + k * kLanes<A>), difference = load(scratch.difference + k * kLanes<A>);
    const Integers number = Integers{} + static_cast<decltype(Integers{}[0] + 0)>(k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<A> value = top + weight[r] * difference;
      const Integers wins = ~(value <= largest[r]) & (largest[r] == largest[r]);
      largest[r] = wins ? value : largest[r];
      index[r] = wins ? number : index[r];
    }
  }
  for (int r = 0; r < R; ++r) {
    int64_t* const target = args.indices + (image * args.rows + row + r) * args.columns + block.first;
    for (int64_t i = 0; i < block.count; ++i) target[i] = index[r][i];
  }
}

template <class T>
void argmax(const UpsampledArgs& args, UpsampledUnit unit, void* memory) {
  using A = Acc<T>;
  Scratch<A> scratch(args, memory);
  for_cell_rows<T>(args, unit, scratch, [&](int64_t row) {
    const int64_t first = args.first_row[row], last = args.first_row[row + 1];
    for (int64_t column = 0; first < last && column < args.columns; column += kLanes<A>) {
      const Block<A> block(args, column);
      scratch.spread(block);
      for_rows(first, last, [&](auto rows, int64_t pixel_row) {
        argmax_of_rows<rows.value>(args, unit.image, pixel_row, block, scratch);
      });
    }
  });
}

#define ANNNET_DTYPES(function) {function<float>, function<double>, function<BFloat16>, function<Float16>}

constexpr UpsampledLogitsKernels table = {
    .cross_entropy = ANNNET_DTYPES(cross_entropy),
    .argmax = ANNNET_DTYPES(argmax),
    .add_border = ANNNET_DTYPES(add_border),
    .lanes = ANNNET_DTYPES(kLanes),
};

#undef ANNNET_DTYPES

}  // namespace upsampled

}  // namespace annnet::ANNNET_LEVEL
