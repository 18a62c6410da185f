// Checks at the entries of the native operators, which can be called directly. Each message names the argument, what
// was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>

#include "pyramid_geometry.h"

#define ANNNET_CHECK_RANK(x, rank) \
  TORCH_CHECK_VALUE((x).dim() == (rank), #x ": expected ", rank, " dimensions, got shape ", (x).sizes())

// ANNNET_CHECK_SHAPE(x, B, C, T)
#define ANNNET_CHECK_SHAPE(x, ...)                                                         \
  TORCH_CHECK_VALUE((x).sizes() == at::IntArrayRef({__VA_ARGS__}), #x ": expected shape ", \
                    at::IntArrayRef({__VA_ARGS__}), " (" #__VA_ARGS__ "), got ", (x).sizes())

// Same device and same dtype.
#define ANNNET_CHECK_SAME_KIND(x, other)                                                                              \
  do {                                                                                                                \
    TORCH_CHECK_VALUE((x).device() == (other).device(), #x ": expected the device of " #other ", ", (other).device(), \
                      ", got ", (x).device());                                                                        \
    TORCH_CHECK_TYPE((x).scalar_type() == (other).scalar_type(), #x ": expected the dtype of " #other ", ",           \
                     (other).scalar_type(), ", got ", (x).scalar_type());                                             \
  } while (false)

#define ANNNET_CHECK_DTYPE(x, expected) \
  TORCH_CHECK_TYPE((x).scalar_type() == (expected), #x ": expected dtype ", expected, ", got ", (x).scalar_type())

namespace annnet {

// (B, C, T) tokens of a pyramid.
inline void check_tokens(const at::Tensor& tokens, at::IntArrayRef heights, at::IntArrayRef widths, int64_t batch,
                         int64_t channels) {
  TORCH_CHECK_VALUE(heights.size() == widths.size() && !heights.empty(),
                    "heights and widths: expected one of each per level and at least one level, got ", heights, " and ",
                    widths);
  for (const int64_t size : heights) TORCH_CHECK_VALUE(size > 0, "heights: expected positive sizes, got ", heights);
  for (const int64_t size : widths) TORCH_CHECK_VALUE(size > 0, "widths: expected positive sizes, got ", widths);
  const int64_t count = level_offset(heights.data(), widths.data(), static_cast<int64_t>(heights.size()));
  ANNNET_CHECK_SHAPE(tokens, batch, channels, count);
}

}  // namespace annnet
