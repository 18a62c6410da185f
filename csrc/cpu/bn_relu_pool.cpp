// annnet_native::bn_relu_bwd_sums and bn_relu_bwd_input on the CPU: checks and threads around the kernels.
#include "bn_relu_pool.h"

#include <torch/library.h>

#include <optional>
#include <vector>

#include "../checks.h"
#include "pool_problem.h"

namespace annnet {

namespace {

using MaybeTensor = std::optional<at::Tensor>;

struct BnReluProblem : PoolProblem {
  BnReluProblem(const at::Tensor& y, const NormTable& norm, const MaybeTensor& grad_tokens, const MaybeTensor& grad_map,
                at::IntArrayRef heights, at::IntArrayRef widths)
      : PoolProblem(y, heights, widths) {
    gradient.pool = args;
    gradient.pool.norm = norm;
    gradient.has_tokens = grad_tokens.has_value();
    gradient.has_map = grad_map.has_value();
    if (gradient.has_tokens) gradient.pool.tokens = tokens_of(*grad_tokens);
    if (gradient.has_map) gradient.grad_map = map_of(*grad_map, lines);
  }

  BnReluArgs gradient = {};
};

void check_gradients(const at::Tensor& y, const MaybeTensor& grad_tokens, const MaybeTensor& grad_map,
                     at::IntArrayRef heights, at::IntArrayRef widths) {
  ANNNET_CHECK_RANK(y, 4);
  TORCH_CHECK_VALUE(grad_tokens || grad_map, "grad_tokens and grad_map: expected at least one of them");
  if (grad_tokens) {
    check_tokens(*grad_tokens, heights, widths, y.size(0), y.size(1));
    ANNNET_CHECK_SAME_KIND(*grad_tokens, y);
  }
  if (grad_map) {
    ANNNET_CHECK_SHAPE(*grad_map, y.size(0), y.size(1), y.size(2), y.size(3));
    ANNNET_CHECK_SAME_KIND(*grad_map, y);
  }
}

// sums (2, C) = Σ over images and row segments, in their order and in float64.
template <class Accumulator>
void add_up(const PoolProblem& problem, const Accumulator* partial, Accumulator* sums) {
  const int64_t channels = problem.args.channels, block = problem.args.block, segments = problem.args.rows.segments;
  std::vector<double> totals(2 * channels, 0.0);
  for (int64_t index = 0; index < problem.units(); ++index) {
    const PoolUnit unit = problem.unit(index);
    for (int64_t segment = 0; segment < segments; ++segment, partial += 2 * block) {
      for (int64_t c = 0; c < unit.count; ++c) {
        totals[unit.channel + c] += partial[c];
        totals[channels + unit.channel + c] += partial[block + c];
      }
    }
  }
  std::copy(totals.begin(), totals.end(), sums);
}

void bn_relu_bwd_sums(const at::Tensor& y, const at::Tensor& norm, const MaybeTensor& grad_tokens,
                      const MaybeTensor& grad_map, at::IntArrayRef heights, at::IntArrayRef widths, at::Tensor& sums) {
  check_gradients(y, grad_tokens, grad_map, heights, widths);
  const NormTable table = norm_of(norm, y);
  ANNNET_CHECK_SHAPE(sums, 2, y.size(1));
  ANNNET_CHECK_DTYPE(sums, accumulator_of(y));
  TORCH_CHECK_VALUE(sums.is_contiguous(), "sums: expected contiguous memory, got strides ", sums.strides());
  if (y.numel() == 0) {
    sums.zero_();
    return;
  }
  const BnReluProblem problem(y, table, grad_tokens, grad_map, heights, widths);
  const BnReluPoolKernels& level = kernels().bn_relu_pool;
  const auto kernel = (problem.lines == Lines::channels ? level.sums_channels : level.sums_rows)[problem.dtype];
  const int64_t segment_bytes = 2 * problem.args.block * problem.accumulator_size();
  const int64_t segments = problem.args.rows.segments;
  const at::Tensor partial = scratch_memory(problem.units() * segments * segment_bytes);
  problem.for_row_segments(0, problem.units(), [&](int64_t index, int64_t first, int64_t last, void* scratch) {
    kernel(problem.gradient, problem.unit(index), first, last,
           address(partial, (index * segments + first) * segment_bytes), scratch);
  });
  if (problem.dtype == kFloat64)
    add_up(problem, static_cast<const double*>(partial.const_data_ptr()), sums.mutable_data_ptr<double>());
  else
    add_up(problem, static_cast<const float*>(partial.const_data_ptr()), sums.mutable_data_ptr<float>());
}

void bn_relu_bwd_input(const at::Tensor& y, const at::Tensor& norm, const MaybeTensor& grad_tokens,
                       const MaybeTensor& grad_map, const MaybeTensor& sums, int64_t count, at::IntArrayRef heights,
                       at::IntArrayRef widths, at::Tensor& dy) {
  check_gradients(y, grad_tokens, grad_map, heights, widths);
  const NormTable table = norm_of(norm, y);
  ANNNET_CHECK_SHAPE(dy, y.size(0), y.size(1), y.size(2), y.size(3));
  ANNNET_CHECK_SAME_KIND(dy, y);
  if (sums) {
    ANNNET_CHECK_SHAPE(*sums, 2, y.size(1));
    ANNNET_CHECK_DTYPE(*sums, accumulator_of(y));
  }
  if (y.numel() == 0) return;
  BnReluProblem problem(y, table, grad_tokens, grad_map, heights, widths);
  const at::Tensor means = sums ? sums->div(count).contiguous() : at::Tensor();
  problem.gradient.mean_sums = sums ? means.const_data_ptr() : nullptr;
  problem.gradient.dy = map_of(dy, problem.lines);
  const BnReluPoolKernels& level = kernels().bn_relu_pool;
  const auto kernel = (problem.lines == Lines::channels ? level.input_channels : level.input_rows)[problem.dtype];
  problem.for_row_segments(0, problem.units(), [&](int64_t index, int64_t first, int64_t last, void* scratch) {
    kernel(problem.gradient, problem.unit(index), first, last, scratch);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(annnet_native, CPU, m) {
  m.impl("bn_relu_bwd_sums", &bn_relu_bwd_sums);
  m.impl("bn_relu_bwd_input", &bn_relu_bwd_input);
}

}  // namespace annnet
