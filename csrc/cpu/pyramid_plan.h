// The cuts of both axes of a map for one pyramid, as pyramid_pool.h describes them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "pyramid_pool.h"

namespace annnet {

class PyramidPlan {
 public:
  // With `transposed`, the rows of the plan are the columns of the map and the other way round; tokens keep their
  // order.
  PyramidPlan(int64_t height, int64_t width, at::IntArrayRef heights, at::IntArrayRef widths, bool transposed);

  // Points the arguments at this plan, which must outlive them.
  void describe(PoolArgs& args) const;

 private:
  struct Axis {
    Axis(int64_t length, at::IntArrayRef bins, int64_t longest_segment);
    PoolAxis view() const;

    std::vector<int64_t> segment_start, segment_of, bin_first, bin_last, bin_length, holder_start, holders;
  };

  Axis rows_, columns_;
  std::vector<PoolLevel> levels_;
  std::vector<int64_t> row_bin_level_;
};

}  // namespace annnet
