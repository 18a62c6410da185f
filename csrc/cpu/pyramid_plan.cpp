#include "pyramid_plan.h"

#include <algorithm>
#include <limits>

#include "pyramid_geometry.h"

namespace annnet {

namespace {

// Row segments are the unit of parallel work, so tall ones are cut further.
constexpr int64_t kTallestSegment = 32;
constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

}  // namespace

PyramidPlan::Axis::Axis(int64_t length, at::IntArrayRef bins, int64_t longest_segment) {
  std::vector<int64_t> first_pixel, last_pixel;
  for (const int64_t count : bins) {
    for (int64_t i = 0; i < count; ++i) {
      first_pixel.push_back(bin_start(i, length, count));
      last_pixel.push_back(bin_end(i, length, count));
      bin_length.push_back(last_pixel.back() - first_pixel.back());
    }
  }
  segment_start = {0, length};
  segment_start.insert(segment_start.end(), first_pixel.begin(), first_pixel.end());
  segment_start.insert(segment_start.end(), last_pixel.begin(), last_pixel.end());
  if (longest_segment < length)
    for (int64_t pixel = longest_segment; pixel < length; pixel += longest_segment) segment_start.push_back(pixel);
  std::sort(segment_start.begin(), segment_start.end());
  segment_start.erase(std::unique(segment_start.begin(), segment_start.end()), segment_start.end());

  const auto segment_at = [&](int64_t pixel) {
    return std::lower_bound(segment_start.begin(), segment_start.end(), pixel) - segment_start.begin();
  };
  const int64_t segments = static_cast<int64_t>(segment_start.size()) - 1;
  for (int64_t s = 0; s < segments; ++s)
    segment_of.insert(segment_of.end(), segment_start[s + 1] - segment_start[s], s);
  segment_of.insert(segment_of.end(), 15, segments - 1);
  std::vector<std::vector<int64_t>> held_by(segments);
  for (size_t bin = 0; bin < bin_length.size(); ++bin) {
    bin_first.push_back(segment_at(first_pixel[bin]));
    bin_last.push_back(segment_at(last_pixel[bin]));
    for (int64_t s = bin_first[bin]; s < bin_last[bin]; ++s) held_by[s].push_back(static_cast<int64_t>(bin));
  }
  holder_start.push_back(0);
  for (const auto& list : held_by) {
    holders.insert(holders.end(), list.begin(), list.end());
    holder_start.push_back(static_cast<int64_t>(holders.size()));
  }
}

PoolAxis PyramidPlan::Axis::view() const {
  return {
      .segments = static_cast<int64_t>(segment_start.size()) - 1,
      .segment_start = segment_start.data(),
      .segment_of = segment_of.data(),
      .bins = static_cast<int64_t>(bin_length.size()),
      .bin_first = bin_first.data(),
      .bin_last = bin_last.data(),
      .bin_length = bin_length.data(),
      .holder_start = holder_start.data(),
      .holders = holders.data(),
  };
}

PyramidPlan::PyramidPlan(int64_t height, int64_t width, at::IntArrayRef heights, at::IntArrayRef widths,
                         bool transposed)
    : rows_(transposed ? width : height, transposed ? widths : heights, kTallestSegment),
      columns_(transposed ? height : width, transposed ? heights : widths, kUnlimited) {
  int64_t row_bin = 0, column_bin = 0;
  for (size_t level = 0; level < heights.size(); ++level) {
    const int64_t rows = transposed ? widths[level] : heights[level];
    const int64_t columns = transposed ? heights[level] : widths[level];
    levels_.push_back({
        .rows = rows,
        .first_row_bin = row_bin,
        .columns = columns,
        .first_column_bin = column_bin,
        .token = level_offset(heights.data(), widths.data(), static_cast<int64_t>(level)),
        .row_stride = transposed ? 1 : widths[level],
        .column_stride = transposed ? widths[level] : 1,
    });
    row_bin_level_.insert(row_bin_level_.end(), rows, static_cast<int64_t>(level));
    row_bin += rows;
    column_bin += columns;
  }
}

void PyramidPlan::describe(PoolArgs& args) const {
  args.rows = rows_.view();
  args.columns = columns_.view();
  args.levels = levels_.data();
  args.row_bin_level = row_bin_level_.data();
}

}  // namespace annnet
