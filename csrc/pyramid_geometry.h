// Bin geometry of the pyramid: the one C++ mirror of annnet_kernels/pyramid.py, for host and device code.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define ANNNET_HOST_DEVICE __host__ __device__
#else
#define ANNNET_HOST_DEVICE
#endif

namespace annnet {

// First pixel of bin `index` of `bins` bins over `length` pixels, as in AdaptiveAvgPool2d.
ANNNET_HOST_DEVICE inline int64_t bin_start(int64_t index, int64_t length, int64_t bins) {
  return index * length / bins;
}

// One past its last pixel.
ANNNET_HOST_DEVICE inline int64_t bin_end(int64_t index, int64_t length, int64_t bins) {
  return ((index + 1) * length + bins - 1) / bins;
}

// The bins that hold a pixel are first_holder … last_holder - 1.
ANNNET_HOST_DEVICE inline int64_t first_holder(int64_t pixel, int64_t length, int64_t bins) {
  return pixel * bins / length;
}

ANNNET_HOST_DEVICE inline int64_t last_holder(int64_t pixel, int64_t length, int64_t bins) {
  return ((pixel + 1) * bins + length - 1) / length;
}

// Tokens of the levels 0 … levels - 1: the first token of level `levels`, or T if there are no more.
ANNNET_HOST_DEVICE inline int64_t level_offset(const int64_t* heights, const int64_t* widths, int64_t levels) {
  int64_t tokens = 0;
  for (int64_t level = 0; level < levels; ++level) tokens += heights[level] * widths[level];
  return tokens;
}

}  // namespace annnet
