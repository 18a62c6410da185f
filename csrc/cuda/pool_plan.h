// The cuts of both axes of a map for one pyramid, small enough to be an argument of a kernel.
//
// An axis is cut at every edge of every bin of every level. A pixel lies in one cell (row segment × column segment)
// and is added once; a bin is a run of segments, so no sum is ever made by subtraction. All pixels of a cell have the
// same gradient.
//
// Beside the cuts, an axis is divided evenly into parts for parallel work. What is left of a segment in a part is a
// piece, and has the slot part + segment: slots rise along the axis, so those of a bin are a run. Where a part begins
// together with a segment, a slot stays empty and counts as zero.
#pragma once

#include <algorithm>
#include <vector>

#include "../pyramid_geometry.h"

namespace annnet::cuda {

// With these limits and the rest of its arguments a kernel stays below the 4 KiB that any driver takes. The usual
// pyramid has 18 bins and at most 23 segments in 4 levels.
constexpr int kBins = 96, kSegments = 128, kHolders = 512, kLevels = 12;

struct PoolAxis {
  int length, bins, segments;
  int cut[kSegments + 1];             // segment s holds the pixels cut[s] … cut[s + 1] - 1
  uint8_t first[kBins], last[kBins];  // bin k, of all levels, holds the segments first[k] … last[k] - 1
  uint8_t level[kBins];               // the level of bin k
  uint16_t holder_start[kSegments + 1];
  uint8_t holders[kHolders];  // holders[holder_start[s] … holder_start[s + 1] - 1] are the bins that hold segment s

  ANNNET_HOST_DEVICE int segment_at(int pixel) const {
    int below = 0, above = segments;
    while (above - below > 1) {
      const int middle = (below + above) / 2;
      (cut[middle] <= pixel ? below : above) = middle;
    }
    return below;
  }

  ANNNET_HOST_DEVICE int bin_length(int bin) const { return cut[last[bin]] - cut[first[bin]]; }

  // Slots first_slot … last_slot of a bin, for parts of `part` pixels.
  ANNNET_HOST_DEVICE int first_slot(int bin, int part) const { return cut[first[bin]] / part + first[bin]; }
  ANNNET_HOST_DEVICE int last_slot(int bin, int part) const { return (cut[last[bin]] - 1) / part + last[bin] - 1; }
  ANNNET_HOST_DEVICE int slots(int part) const { return (length - 1) / part + segments; }
};

// Token `token + i · row_stride + j · column_stride` is bin (i, j) of the level.
struct PoolLevel {
  int rows, first_row_bin;
  int columns, first_column_bin;
  int token, row_stride, column_stride;
};

struct PoolPlan {
  PoolAxis rows, columns;
  int levels, tokens;
  PoolLevel level[kLevels];
};

// Fills `axis`; false if the bins are too many for it.
inline bool cut_axis(int64_t length, const int64_t* counts, int levels, PoolAxis& axis) {
  std::vector<int64_t> starts, ends, cuts;
  for (int level = 0; level < levels; ++level) {
    if (counts[level] > kBins - static_cast<int64_t>(starts.size())) return false;
    for (int64_t i = 0; i < counts[level]; ++i) {
      axis.level[starts.size()] = static_cast<uint8_t>(level);
      starts.push_back(bin_start(i, length, counts[level]));
      ends.push_back(bin_end(i, length, counts[level]));
    }
  }
  cuts = starts;
  cuts.insert(cuts.end(), ends.begin(), ends.end());
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  if (cuts.size() > kSegments + 1) return false;
  axis.length = static_cast<int>(length);
  axis.bins = static_cast<int>(starts.size());
  axis.segments = static_cast<int>(cuts.size()) - 1;
  std::copy(cuts.begin(), cuts.end(), axis.cut);
  for (int bin = 0; bin < axis.bins; ++bin) {
    axis.first[bin] = static_cast<uint8_t>(std::lower_bound(cuts.begin(), cuts.end(), starts[bin]) - cuts.begin());
    axis.last[bin] = static_cast<uint8_t>(std::lower_bound(cuts.begin(), cuts.end(), ends[bin]) - cuts.begin());
  }
  int holders = 0;
  for (int segment = 0; segment < axis.segments; ++segment) {
    axis.holder_start[segment] = static_cast<uint16_t>(holders);
    for (int bin = 0; bin < axis.bins; ++bin) {
      if (segment < axis.first[bin] || segment >= axis.last[bin]) continue;
      if (holders == kHolders) return false;
      axis.holders[holders++] = static_cast<uint8_t>(bin);
    }
  }
  axis.holder_start[axis.segments] = static_cast<uint16_t>(holders);
  return true;
}

// Fills `plan`; false if the pyramid is too large for it. With `transposed`, the rows of the plan are the columns of
// the map and the other way round; tokens keep their order.
inline bool make_plan(int64_t height, int64_t width, const int64_t* heights, const int64_t* widths, int levels,
                      bool transposed, PoolPlan& plan) {
  if (levels > kLevels || height >= INT32_MAX || width >= INT32_MAX) return false;
  if (transposed) {
    std::swap(height, width);
    std::swap(heights, widths);
  }
  if (!cut_axis(height, heights, levels, plan.rows) || !cut_axis(width, widths, levels, plan.columns)) return false;
  plan.levels = levels;
  int row_bin = 0, column_bin = 0, token = 0;
  for (int i = 0; i < levels; ++i) {
    const int rows = static_cast<int>(heights[i]), columns = static_cast<int>(widths[i]);
    plan.level[i] = {rows, row_bin, columns, column_bin, token, transposed ? 1 : columns, transposed ? rows : 1};
    row_bin += rows;
    column_bin += columns;
    token += rows * columns;
  }
  plan.tokens = token;
  return true;
}

}  // namespace annnet::cuda
