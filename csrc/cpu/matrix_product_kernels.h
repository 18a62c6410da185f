// C = A B for matrices as large as a map: a part of B is packed into the second cache and meets every row of A there.
//
// On one core of an AMD EPYC (Zen 5) that multiplies and adds 250 GFLOP/s at most, 205 to 230 are reached for 512 → 512
// channels of 97 × 97 pixels and 2048 → 2048 of 49 × 49, in the output of a pointwise convolution and in its gradients.
#pragma once

#include "matrix_product.h"
#include "pack.h"

namespace annnet::ANNNET_LEVEL {

// A part of B: with fewer columns A is read too often, with more of either the part leaves the second cache. Products
// of 2048 channels took up to 11 % longer with depths up to 640, and up to 37 % with depths up to 2560.
constexpr int64_t kMostDepth = 1280, kPartFloats = 73728, kMostColumns = 480;

constexpr int64_t kPackedTogether = 8;  // panels: 64 adjacent rows at a time, whole cache lines where rows are adjacent

inline int64_t part_columns(int64_t depth) {
  constexpr int64_t kTile = kTileVectors * kLanes<float>;
  const int64_t columns = minimum(kPartFloats / depth, kMostColumns) / kTile * kTile;
  return columns > kTile ? columns : kTile;
}

inline MatrixProductPlan plan_product(const MatrixProduct& args, int64_t threads) {
  constexpr int64_t kLeastVectors = 2 * kTileVectors;  // of a piece
  MatrixProductPlan plan = {};
  plan.panels = round_up(args.rows, kTileRows) / kTileRows;
  plan.packed_panels = args.a.column == 1 ? plan.panels - args.rows / kTileRows : plan.panels;
  plan.packed_images = args.a.image == 0 ? 1 : args.images;
  plan.packed_floats = plan.packed_images * plan.packed_panels * kTileRows * args.depth;
  plan.scratch_floats = args.depth * leading_dimension<float>(part_columns(args.depth));
  // Pieces of rows pack all of B each, pieces of columns read all of A.
  const int64_t pieces = args.images % threads == 0 ? 1 : threads;
  const int64_t vectors = vectors_of<float>(args.columns);
  const int64_t most = args.rows > 2 * args.columns ? 1 : vectors / kLeastVectors;
  plan.column_pieces = most < 1 ? 1 : minimum(pieces, most);
  plan.row_pieces = minimum((pieces + plan.column_pieces - 1) / plan.column_pieces, plan.panels);
  return plan;
}

inline float* packed_panel(const MatrixProduct& args, int64_t image, int64_t panel) {
  const MatrixProductPlan& plan = args.plan;
  const int64_t first = plan.packed_images > 1 ? image * plan.packed_panels : 0;
  const int64_t index = first + panel - (plan.panels - plan.packed_panels);
  return args.packed + index * kTileRows * args.depth;
}

inline void pack_product(const MatrixProduct& args, int64_t begin, int64_t end) {
  const MatrixProductPlan& plan = args.plan;
  for (int64_t index = begin; index < end;) {
    const int64_t image = index / plan.packed_panels;
    const int64_t first = plan.panels - plan.packed_panels + index % plan.packed_panels;
    const int64_t last = minimum(minimum(first + kPackedTogether, plan.panels), first + end - index);
    for (int64_t k = 0; k < args.depth; ++k)
      for (int64_t panel = first; panel < last; ++panel) {
        float* const target = packed_panel(args, image, panel) + k * kTileRows;
        const float* const source =
            args.a.data + image * args.a.image + panel * kTileRows * args.a.row + k * args.a.column;
        const int64_t rows = args.rows - panel * kTileRows;
        if (args.a.row == 1 && rows >= kTileRows)
          memcpy(target, source, kTileRows * sizeof(float));
        else
          for (int64_t i = 0; i < kTileRows; ++i) target[i] = i < rows ? source[i * args.a.row] : 0.0f;
      }
    index += last - first;
  }
}

// Sink: the tiles of one panel of rows, from `target` on; `rows` and `columns` are those that are left of C there.
struct ToProduct {
  float* target;
  int64_t stride, rows, columns;
  const float* bias;  // of the panel's rows, or null
  bool add;
  WriteAhead ahead;

  ANNNET_INLINE void begin(int64_t, int64_t) const {}
  ANNNET_INLINE void expect() { ahead.advance(); }
  ANNNET_INLINE void operator()(int64_t row, int64_t column, FloatVector value) const {
    if (row >= rows) return;
    float* const place = target + row * stride + column;
    if (add) value += load_lanes(place, 1, columns - column);
    if (bias != nullptr) value += bias[row];
    store_lanes(place, 1, value, columns - column);
  }
};

inline ToProduct panel_of_product(const MatrixProduct& args, int64_t image, int64_t panel, int64_t column,
                                  int64_t columns) {
  const int64_t row = panel * kTileRows, rows = minimum(kTileRows, args.rows - row);
  float* const target = args.c + image * args.c_image + row * args.columns + column;
  return {.target = target,
          .stride = args.columns,
          .rows = rows,
          .columns = args.columns - column,
          .bias = args.bias == nullptr ? nullptr : args.bias + row,
          .add = args.add,
          .ahead = WriteAhead::of_rows(target, args.columns, columns, rows, 64)};
}

// `rows` rows of memory, `stride` apart, to be asked for within `steps` steps, or as much of them as a line per step
// is.
inline ReadAhead ahead_within(int64_t steps, const float* data, int64_t stride, int64_t length, int64_t rows) {
  constexpr int64_t kLine = 64;
  ReadAhead ahead = ReadAhead::of_rows(data, stride, length, rows, kLine);
  ahead.step = minimum(kLine, ahead.bytes * rows / steps + 1);
  return ahead;
}

// The `columns` columns of B at `data`; nothing where its elements are no neighbours.
inline ReadAhead ahead_of_part(const MatrixProduct& args, const float* data, int64_t columns, int64_t steps) {
  if (columns <= 0) return {};
  if (args.b.column == 1) return ahead_within(steps, data, args.b.row, columns, args.depth);
  if (args.b.row == 1) return ahead_within(steps, data, args.b.column, args.depth, columns);
  return {};
}

inline void pack_part(const MatrixProduct& args, const float* b, int64_t columns, float* target, int64_t stride) {
  for (int64_t column = 0; column < columns; column += kBlock<float>) {
    Positions<float> positions;
    positions.data = b + column * args.b.column;
    positions.channel_stride = args.b.row;
    positions.append(0, args.b.column, minimum(kBlock<float>, columns - column));
    positions.find_steps();
    pack_channels<float>(positions, 0, args.depth, target + column, stride);
  }
}

inline void multiply_product(const MatrixProduct& args, float* scratch, int64_t begin, int64_t end) {
  const MatrixProductPlan& plan = args.plan;
  const int64_t pieces = plan.row_pieces * plan.column_pieces, direct = plan.panels - plan.packed_panels;
  const int64_t vectors = vectors_of<float>(args.columns), width = part_columns(args.depth);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / pieces, row_piece = index % plan.row_pieces;
    const int64_t column_piece = index % pieces / plan.row_pieces;
    const int64_t first_panel = plan.panels * row_piece / plan.row_pieces;
    const int64_t last_panel = plan.panels * (row_piece + 1) / plan.row_pieces;
    const int64_t first_column = vectors * column_piece / plan.column_pieces * kLanes<float>;
    const int64_t last_column =
        minimum(vectors * (column_piece + 1) / plan.column_pieces * kLanes<float>, args.columns);
    const float* const a = args.a.data + image * args.a.image;
    for (int64_t column = first_column; column < last_column; column += width) {
      const int64_t columns = minimum(width, last_column - column), stride = leading_dimension<float>(columns);
      const float* const b = args.b.data + image * args.b.image + column * args.b.column;
      pack_part(args, b, columns, scratch, stride);
      const int64_t tiles = (columns + kTileVectors * kLanes<float> - 1) / (kTileVectors * kLanes<float>);
      const int64_t steps = tiles * args.depth;  // of one panel
      ReadAhead ahead = {};
      if (args.rows <= args.columns)
        ahead = ahead_of_part(args, b + columns * args.b.column, minimum(width, last_column - column - columns),
                              steps * (last_panel - first_panel));
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const ToProduct sink = panel_of_product(args, image, panel, column, columns);
        const float* const rows = a + panel * kTileRows * args.a.row;
        if (args.rows > args.columns && panel + 1 < direct)
          ahead = ahead_within(steps, rows + kTileRows * args.a.row, args.a.row, args.depth, kTileRows);
        if (panel < direct)
          multiply<float>(kTileRows, columns, args.depth, ByRow<float>{rows, args.a.row}, scratch, stride, sink, ahead);
        else
          multiply<float>(kTileRows, columns, args.depth, ByDepth<float>{packed_panel(args, image, panel), kTileRows},
                          scratch, stride, sink, ahead);
      }
    }
  }
}

constexpr MatrixProductKernels matrix_product_kernels = {kMostDepth, plan_product, pack_product, multiply_product};

}  // namespace annnet::ANNNET_LEVEL
