// Arguments and table of the kernels of upsampled logits: cross-entropy with its gradient, and argmax. Plain C types
// only: see levels.h.
//
// A unit is a range of rows of cells (low-resolution logits) of one image, with the rows of pixels that lie below them.
// In a unit the lanes of a vector are pixels of a row. Cells are kept class by class next to each other, so that
// columns are interpolated with classes in the lanes and transposed in registers. Units do not depend on the number of
// threads; a row of cells at the border of two units gets the sum of two parts. So results are bitwise the same for any
// number of threads.
#pragma once

#include <stdint.h>

#include "dtypes.h"

namespace annnet {

// A row or column of pixels lies between the cells `low` and `high`, of which `high` has the weight. See lines() in
// annnet_kernels/upsampling.py.
struct UpsampledLine {
  int64_t low, high;
  double weight;
};

enum LabelType { kInt64, kInt32, kUint8 };

// Strides are in elements.
struct UpsampledCells {
  void* data;
  int64_t batch, channel, row, column;
};

struct UpsampledPixels {
  void* data;
  int64_t batch, row, column;
};

struct UpsampledArgs {
  int64_t classes, height, width;  // of the cells
  int64_t rows, columns;           // of pixels
  const UpsampledLine *row_lines, *column_lines;
  const int64_t* first_row;  // (height + 1): first row of pixels below each row of cells
  UpsampledCells logits;

  // of the cross-entropy
  UpsampledPixels target;
  LabelType label_type;
  int64_t ignore_index;
  const void* weight;       // (classes) accumulators, or null for 1
  double smoothing;         // label smoothing
  UpsampledPixels grad;     // upstream gradients, accumulators; data is null for 1
  void* losses;             // (B, rows, columns) accumulators, or null
  UpsampledCells gradient;  // accumulators; data is null if none is asked for

  int64_t* indices;  // (B, rows, columns): of the argmax
};

// Rows first … last - 1 of the cells of an image.
struct UpsampledUnit {
  int64_t image, first, last;
};

// What a unit of the cross-entropy leaves behind.
struct UpsampledSums {
  double loss, weight;
  bool has_wrong_label;
  int64_t wrong_label;
};

struct UpsampledLogitsKernels {
  // `border` (width, padded classes): the gradient's part in row `last`, which belongs to the next unit.
  using CrossEntropy = void (*)(const UpsampledArgs&, UpsampledUnit, void* scratch, void* border, UpsampledSums*);
  using Argmax = void (*)(const UpsampledArgs&, UpsampledUnit, void* scratch);
  // Adds a unit's border to row `last` of the gradient.
  using AddBorder = void (*)(const UpsampledArgs&, UpsampledUnit, const void* border);

  CrossEntropy cross_entropy[kDtypes];
  Argmax argmax[kDtypes];
  AddBorder add_border[kDtypes];
  int64_t lanes[kDtypes];  // of a vector; classes are padded to a multiple of it
};

// Accumulators of scratch that a unit needs, for `padded` classes.
inline int64_t upsampled_scratch(const UpsampledArgs& args, int64_t padded, int64_t lanes) {
  constexpr int64_t kPerClass = 8;  // top, difference, four rows of logits, two of gradients
  return padded * (4 * args.width + kPerClass * lanes) + lanes;
}

}  // namespace annnet
