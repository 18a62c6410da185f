// Arguments and table of the matrix product, float32. Plain C types only: see levels.h.
#pragma once

#include <stdint.h>

namespace annnet {

// Elements lie `row` and `column` apart, images `image`.
struct Matrix {
  const float* data;
  int64_t row, column, image;
};

// How a product is cut into parallel pieces and what memory they need.
struct MatrixProductPlan {
  int64_t row_pieces, column_pieces;  // of an image
  int64_t panels, packed_panels;      // rows in whole tiles, and how many of those are packed
  int64_t packed_images;              // one where all images share A
  int64_t packed_floats;              // of the packed panels of all images
  int64_t scratch_floats;             // one thread's part of b, packed
};

// C = A B for each of `images` images: (rows × depth) (depth × columns). Whatever the number of threads, an element of
// C is the same sum in the same order.
struct MatrixProduct {
  int64_t images, rows, columns, depth;
  Matrix a, b;
  float* c;  // dense
  int64_t c_image;
  const float* bias;  // one for each row is added to C, if given
  bool add;           // to what C holds
  MatrixProductPlan plan;
  float* packed;
};

struct MatrixProductKernels {
  int64_t most_depth;  // of one call; a deeper product is several, of which the later ones add
  MatrixProductPlan (*plan)(const MatrixProduct&, int64_t threads);
  // Packs the rows of A from panel `begin` to `end` of those of all packed images that are packed.
  void (*pack)(const MatrixProduct&, int64_t begin, int64_t end);
  // The pieces from `begin` to `end` of all images'; `scratch` is this thread's.
  void (*multiply)(const MatrixProduct&, float* scratch, int64_t begin, int64_t end);
};

}  // namespace annnet
