// What the hosts of pooling and of the normalised maps share: how a map is walked and how threads share it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <utility>

#include "../checks.h"
#include "levels.h"
#include "pyramid_plan.h"
#include "tensors.h"

namespace annnet {

enum class Lines { rows, columns, channels };

// The longest run of neighbours in memory decides how a map is walked; with none, single elements are gathered.
inline Lines lines_of(const at::Tensor& x) {
  const auto run = [&](int64_t dim) { return x.stride(dim) == 1 ? x.size(dim) : 0; };
  const int64_t rows = run(3), columns = run(2), channels = run(1);
  if (rows >= columns && rows >= channels) return Lines::rows;
  return channels >= columns ? Lines::channels : Lines::columns;
}

// Channels per unit. In rows, a vector of channels is transposed at a time, and more units are more to share out. Else
// the map is best read in long pieces; 512 sums fit the first-level cache, and no unit is left with a short rest.
inline int64_t block_of(int64_t channels, Lines lines) {
  if (lines != Lines::channels) return 16;
  const int64_t units = (channels + 511) / 512;
  return ((channels + units - 1) / units + 15) / 16 * 16;
}

// Uninitialised memory for one thread or one call.
inline at::Tensor scratch_memory(int64_t bytes) { return at::empty({bytes}, at::TensorOptions().dtype(at::kByte)); }

inline char* address(const at::Tensor& memory, int64_t offset = 0) {
  return static_cast<char*>(memory.mutable_data_ptr()) + offset;
}

// Elements that are worth a thread.
constexpr int64_t kGrain = 16384;

inline PoolMap map_of(const at::Tensor& x, Lines lines) {
  const PoolMap map = {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  return lines == Lines::columns ? PoolMap{map.data, map.batch, map.channel, map.column, map.row} : map;
}

inline PoolTokens tokens_of(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

struct PoolProblem {
  PoolProblem(const at::Tensor& map, at::IntArrayRef heights, at::IntArrayRef widths)
      : lines(lines_of(map)),
        plan(map.size(2), map.size(3), heights, widths, lines == Lines::columns),
        dtype(dtype_of(map, "map")),
        images(map.size(0)) {
    plan.describe(args);
    args.channels = map.size(1);
    args.block = block_of(args.channels, lines);
    args.map = map_of(map, lines);
    units_per_image = (args.channels + args.block - 1) / args.block;
  }

  int64_t units() const { return images * units_per_image; }

  int64_t elements() const {
    return images * args.channels * args.rows.segment_start[args.rows.segments] *
           args.columns.segment_start[args.columns.segments];
  }

  PoolUnit unit(int64_t index) const {
    const int64_t channel = index % units_per_image * args.block;
    return {index / units_per_image, channel, std::min(args.block, args.channels - channel)};
  }

  // Calls body(unit index, first, last, scratch) for all row segments of the units from `begin` to `end`. Threads share
  // their rows evenly, and a segment belongs to the thread in whose share it starts.
  template <class Body>
  void for_row_segments(int64_t begin, int64_t end, const Body& body) const {
    const int64_t* start = args.rows.segment_start;
    const int64_t height = start[args.rows.segments];
    const auto segment_at = [&](int64_t row) {
      return std::lower_bound(start, start + args.rows.segments, row) - start;
    };
    at::parallel_for(begin * height, end * height, grain(1), [&](int64_t first_row, int64_t last_row) {
      const at::Tensor scratch = scratch_memory(scratch_bytes());
      for (int64_t index = first_row / height; index * height < last_row; ++index) {
        const int64_t first = segment_at(first_row - index * height), last = segment_at(last_row - index * height);
        if (first < last) body(index, first, last, scratch.mutable_data_ptr());
      }
    });
  }

  // How many pieces of `rows` rows of a unit are worth a thread.
  int64_t grain(int64_t rows) const {
    return std::max<int64_t>(kGrain / (rows * args.columns.segment_start[args.columns.segments] * args.block), 1);
  }

  int64_t accumulator_size() const { return dtype == kFloat64 ? 8 : 4; }

  // Accumulators of the column bins of a row segment.
  int64_t segment_bytes() const { return args.columns.bins * args.block * accumulator_size(); }

  int64_t scratch_bytes() const {
    return kernels().pyramid_pool.scratch_bytes +
           (args.columns.bins + args.columns.segments) * args.block * accumulator_size();
  }

  Lines lines;
  PyramidPlan plan;
  Dtype dtype;
  int64_t images, units_per_image;
  PoolArgs args;
};

}  // namespace annnet
