// annnet_native::pyramid_pool and pyramid_pool_bwd on the CPU: checks, layouts and threads around the kernels.
#include "pyramid_pool.h"

#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../pyramid_geometry.h"
#include "levels.h"
#include "pyramid_plan.h"
#include "tensors.h"

namespace annnet {

namespace {

enum class Lines { rows, columns, channels };

// The longest run of neighbours in memory decides how a map is walked; with none, single elements are gathered.
Lines lines_of(const at::Tensor& x) {
  const auto run = [&](int64_t dim) { return x.stride(dim) == 1 ? x.size(dim) : 0; };
  const int64_t rows = run(3), columns = run(2), channels = run(1);
  if (rows >= columns && rows >= channels) return Lines::rows;
  return channels >= columns ? Lines::channels : Lines::columns;
}

// Channels per unit. In rows, a vector of channels is transposed at a time, and more units are more to share out. Else
// the map is best read in long pieces; 512 sums fit the first-level cache, and no unit is left with a short rest.
int64_t block_of(int64_t channels, Lines lines) {
  if (lines != Lines::channels) return 16;
  const int64_t units = (channels + 511) / 512;
  return ((channels + units - 1) / units + 15) / 16 * 16;
}

// Uninitialised memory for one thread or one call.
at::Tensor scratch_memory(int64_t bytes) { return at::empty({bytes}, at::TensorOptions().dtype(at::kByte)); }

char* address(const at::Tensor& memory, int64_t offset = 0) {
  return static_cast<char*>(memory.mutable_data_ptr()) + offset;
}

struct Problem {
  Problem(const at::Tensor& map, const at::Tensor& tokens, at::IntArrayRef heights, at::IntArrayRef widths)
      : lines(lines_of(map)),
        plan(map.size(2), map.size(3), heights, widths, lines == Lines::columns),
        dtype(dtype_of(map, "map")),
        images(map.size(0)) {
    plan.describe(args);
    args.channels = map.size(1);
    args.block = block_of(args.channels, lines);
    args.map = {const_cast<void*>(map.const_data_ptr()), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
    if (lines == Lines::columns) std::swap(args.map.row, args.map.column);
    args.tokens = {const_cast<void*>(tokens.const_data_ptr()), tokens.stride(0), tokens.stride(1), tokens.stride(2)};
    units_per_image = (args.channels + args.block - 1) / args.block;
  }

  int64_t units() const { return images * units_per_image; }

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
    at::parallel_for(begin * height, end * height, 1, [&](int64_t first_row, int64_t last_row) {
      const at::Tensor scratch = scratch_memory(scratch_bytes());
      for (int64_t index = first_row / height; index * height < last_row; ++index) {
        const int64_t first = segment_at(first_row - index * height), last = segment_at(last_row - index * height);
        if (first < last) body(index, first, last, scratch.mutable_data_ptr());
      }
    });
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

void check_pool(const at::Tensor& tokens, at::IntArrayRef heights, at::IntArrayRef widths, int64_t batch,
                int64_t channels) {
  TORCH_CHECK_VALUE(heights.size() == widths.size() && !heights.empty(),
                    "heights and widths: expected one of each per ", "level and at least one level, got ", heights,
                    " and ", widths);
  for (const int64_t size : heights) TORCH_CHECK_VALUE(size > 0, "heights: expected positive sizes, got ", heights);
  for (const int64_t size : widths) TORCH_CHECK_VALUE(size > 0, "widths: expected positive sizes, got ", widths);
  const int64_t count = level_offset(heights.data(), widths.data(), static_cast<int64_t>(heights.size()));
  ANNNET_CHECK_SHAPE(tokens, batch, channels, count);
}

// Sums of the row segments of many units are kept at a time, but no more than fit a second-level cache or two.
constexpr int64_t kRoundBytes = 8 << 20;

void pyramid_pool(const at::Tensor& x, at::IntArrayRef heights, at::IntArrayRef widths, at::Tensor& out) {
  ANNNET_CHECK_RANK(x, 4);
  check_pool(out, heights, widths, x.size(0), x.size(1));
  ANNNET_CHECK_SAME_KIND(out, x);
  if (x.numel() == 0) return;
  const Problem problem(x, out, heights, widths);
  const PoolArgs& args = problem.args;
  const PyramidPoolKernels& table = kernels().pyramid_pool;
  const auto sum = (problem.lines == Lines::channels ? table.sum_channels : table.sum_rows)[problem.dtype];
  const auto finish = table.finish[problem.dtype];
  const int64_t segment_bytes = problem.segment_bytes();
  const int64_t unit_bytes = args.rows.segments * segment_bytes;

  const int64_t threads = at::get_num_threads();
  if (problem.units() % threads == 0 || problem.units() >= 8 * threads) {
    at::parallel_for(0, problem.units(), 1, [&](int64_t begin, int64_t end) {
      const at::Tensor bins = scratch_memory(unit_bytes), scratch = scratch_memory(problem.scratch_bytes());
      for (int64_t index = begin; index < end; ++index) {
        sum(args, problem.unit(index), 0, args.rows.segments, address(bins), address(scratch));
        finish(args, problem.unit(index), address(bins));
      }
    });
    return;
  }
  const int64_t round = std::clamp<int64_t>(kRoundBytes / unit_bytes, 1, problem.units());
  const at::Tensor bins = scratch_memory(round * unit_bytes);
  for (int64_t begin = 0; begin < problem.units(); begin += round) {
    const int64_t end = std::min(begin + round, problem.units());
    problem.for_row_segments(begin, end, [&](int64_t index, int64_t first, int64_t last, void* scratch) {
      char* target = address(bins, (index - begin) * unit_bytes + first * segment_bytes);
      sum(args, problem.unit(index), first, last, target, scratch);
    });
    at::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
      for (int64_t index = first; index < last; ++index)
        finish(args, problem.unit(index), address(bins, (index - begin) * unit_bytes));
    });
  }
}

void pyramid_pool_bwd(const at::Tensor& grad, at::IntArrayRef map_size, at::IntArrayRef heights, at::IntArrayRef widths,
                      bool channels_last, at::Tensor& dx) {
  ANNNET_CHECK_RANK(grad, 3);
  TORCH_CHECK_VALUE(map_size.size() == 2, "map_size: expected (H, W), got ", map_size);
  check_pool(grad, heights, widths, grad.size(0), grad.size(1));
  ANNNET_CHECK_SHAPE(dx, grad.size(0), grad.size(1), map_size[0], map_size[1]);
  ANNNET_CHECK_SAME_KIND(dx, grad);
  if (dx.numel() == 0) return;
  const Problem problem(dx, grad, heights, widths);
  const PoolArgs& args = problem.args;
  TORCH_CHECK_VALUE(args.map.column == 1 || problem.lines == Lines::channels,
                    "dx: expected neighbours in memory along columns, rows or channels, got strides ", dx.strides());
  const PyramidPoolKernels& table = kernels().pyramid_pool;
  const auto spread = (problem.lines == Lines::channels ? table.spread_channels : table.spread_rows)[problem.dtype];
  problem.for_row_segments(0, problem.units(), [&](int64_t index, int64_t first, int64_t last, void* scratch) {
    spread(args, problem.unit(index), first, last, scratch);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(annnet_native, CPU, m) {
  m.impl("pyramid_pool", &pyramid_pool);
  m.impl("pyramid_pool_bwd", &pyramid_pool_bwd);
}

}  // namespace annnet
