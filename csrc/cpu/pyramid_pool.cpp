// annnet_native::pyramid_pool and pyramid_pool_bwd on the CPU: checks and threads.
#include "pyramid_pool.h"

#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "../checks.h"
#include "levels.h"
#include "pool_problem.h"

namespace annnet {

namespace {

// Sums of the row segments of many units are kept at a time, but no more than fit a second-level cache or two.
constexpr int64_t kRoundBytes = 8 << 20;

void pool(const PoolProblem& problem, PyramidPoolKernels::Sum sum) {
  const PoolArgs& args = problem.args;
  const auto finish = kernels().pyramid_pool.finish[problem.dtype];
  const int64_t segment_bytes = problem.segment_bytes();
  const int64_t unit_bytes = args.rows.segments * segment_bytes;
  const int64_t height = args.rows.segment_start[args.rows.segments];

  const int64_t threads = at::get_num_threads();
  if (problem.units() % threads == 0 || problem.units() >= 8 * threads || problem.elements() <= kGrain) {
    at::parallel_for(0, problem.units(), problem.grain(height), [&](int64_t begin, int64_t end) {
      const at::Tensor bins = scratch_memory(unit_bytes), scratch = scratch_memory(problem.scratch_bytes());
      for (int64_t index = begin; index < end; ++index) {
        sum(args, problem.unit(index), 0, args.rows.segments, address(bins), address(scratch));
        finish(args, problem.unit(index), 0, args.rows.bins, address(bins));
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
    at::parallel_for(begin * args.rows.bins, end * args.rows.bins, 1, [&](int64_t first, int64_t last) {
      for (int64_t bin = first; bin < last; ++bin) {
        const int64_t index = bin / args.rows.bins, row_bin = bin % args.rows.bins;
        finish(args, problem.unit(index), row_bin, row_bin + 1, address(bins, (index - begin) * unit_bytes));
      }
    });
  }
}

void pyramid_pool(const at::Tensor& x, const std::optional<at::Tensor>& norm, at::IntArrayRef heights,
                  at::IntArrayRef widths, at::Tensor& out) {
  ANNNET_CHECK_RANK(x, 4);
  check_tokens(out, heights, widths, x.size(0), x.size(1));
  ANNNET_CHECK_SAME_KIND(out, x);
  const NormTable table = norm ? norm_of(*norm, x) : NormTable{};
  if (x.numel() == 0) return;
  PoolProblem problem(x, heights, widths);
  problem.args.tokens = tokens_of(out);
  problem.args.norm = table;
  const PyramidPoolKernels& kernel = kernels().pyramid_pool;
  const auto& sum = problem.lines == Lines::channels ? (norm ? kernel.sum_channels_bn_relu : kernel.sum_channels)
                                                     : (norm ? kernel.sum_rows_bn_relu : kernel.sum_rows);
  pool(problem, sum[problem.dtype]);
}

void pyramid_pool_bwd(const at::Tensor& grad, const std::optional<at::Tensor>& addend, at::IntArrayRef map_size,
                      at::IntArrayRef heights, at::IntArrayRef widths, bool channels_last, at::Tensor& dx) {
  ANNNET_CHECK_RANK(grad, 3);
  TORCH_CHECK_VALUE(map_size.size() == 2, "map_size: expected (H, W), got ", map_size);
  check_tokens(grad, heights, widths, grad.size(0), grad.size(1));
  ANNNET_CHECK_SHAPE(dx, grad.size(0), grad.size(1), map_size[0], map_size[1]);
  ANNNET_CHECK_SAME_KIND(dx, grad);
  if (addend) {
    ANNNET_CHECK_SHAPE(*addend, dx.size(0), dx.size(1), dx.size(2), dx.size(3));
    ANNNET_CHECK_SAME_KIND(*addend, dx);
    if (!addend->is_same(dx)) dx.copy_(*addend);
  }
  if (dx.numel() == 0) return;
  PoolProblem problem(dx, heights, widths);
  problem.args.tokens = tokens_of(grad);
  problem.args.adds = addend.has_value();
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
