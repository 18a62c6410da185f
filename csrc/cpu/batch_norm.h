// Arguments and table of the kernels of the normalising tail. Plain C types only: see levels.h.
//
// All maps of a call have the same shape and are walked alike: as lines of `length` pixels, one line of all pixels
// where the strides allow it. The lanes of a vector are channels where these are neighbours in memory, else pixels of
// a line. A unit, the smallest piece of work, does not depend on the number of threads, and partial sums are added in
// the order of the units: results are bitwise the same for any number of threads.
#pragma once

#include <stdint.h>

#include "dtypes.h"

namespace annnet {

// Strides are in elements.
struct BatchNormMap {
  void* data;
  int64_t batch, channel, line, step;
};

// All that is no map holds accumulators, and is null where a kernel does not need it.
struct BatchNormArgs {
  int64_t channels, length;
  BatchNormMap y, grad, out;
  const void* norm;           // (4, C): mean, invstd, weight, bias
  const void* shift;          // (C): what moments are taken about
  const void* channel_scale;  // (B, C), or null for 1
  const void* mean_sums;      // (2, C): Σ g / n and Σ g·ŷ / n
};

// Pixels first … last - 1 of the channels channel … channel + channels - 1 of an image.
struct BatchNormUnit {
  int64_t image, channel, channels, first, last;
};

enum Lanes { kPixels, kChannels };

struct BatchNormKernels {
  using Map = void (*)(const BatchNormArgs&, BatchNormUnit);
  // Fills a unit's channels of two rows of C sums.
  using Sum = void (*)(const BatchNormArgs&, BatchNormUnit, double* sums);
  // Fills a unit's channels of C accumulators, a shift K, and of two rows of C sums.
  using Moments = void (*)(const BatchNormArgs&, BatchNormUnit, void* shift, double* sums);

  Moments moments[2][kDtypes];  // [lanes]: Σ (y − K), Σ (y − K)²
  Map apply[2][2][kDtypes];     // [relu][lanes]
  Sum sums[2][2][kDtypes];      // [relu][lanes]: Σ g, Σ g·(y − mean)
  Map input[2][2][2][kDtypes];  // [whether mean_sums are given][relu][lanes]
};

}  // namespace annnet
