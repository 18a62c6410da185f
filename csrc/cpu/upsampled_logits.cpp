// annnet_native::upsampled_cross_entropy, its gradient, and upsampled_argmax on the CPU: checks, geometry and threads.
#include "upsampled_logits.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../checks.h"
#include "levels.h"
#include "tensors.h"

namespace annnet::upsampled_logits {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Units are of one row of cells, unless that makes more of them than this: each loads one row beside its own.
constexpr int64_t kUnits = 64;
constexpr int64_t kUnitRows = 8;
// Upsampled logits below which a second thread costs more than it brings.
constexpr int64_t kGrain = 1 << 14;

std::vector<UpsampledLine> lines(int64_t cells, int64_t pixels, bool align_corners) {
  const int64_t last = cells - 1;
  const int64_t step = align_corners ? last : 2 * cells, start = align_corners ? 0 : cells - pixels;
  const int64_t divisor = align_corners ? std::max<int64_t>(pixels - 1, 1) : 2 * pixels;
  std::vector<UpsampledLine> result(pixels);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t position = std::clamp<int64_t>(pixel * step + start, 0, last * divisor);
    const int64_t low = position / divisor;
    const double weight = static_cast<double>(position % divisor) / static_cast<double>(divisor);
    result[pixel] = {low, std::min(low + 1, last), weight};
  }
  return result;
}

at::ScalarType accumulator(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

UpsampledCells cells_of(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

UpsampledPixels pixels_of(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// Logits and the pixels made from them, cut into units.
class Problem {
 public:
  Problem(const at::Tensor& logits, int64_t rows, int64_t columns, bool align_corners)
      : dtype(dtype_of(logits, "logits")),
        images(logits.size(0)),
        row_lines(lines(logits.size(2), rows, align_corners)),
        column_lines(lines(logits.size(3), columns, align_corners)) {
    args.classes = logits.size(1);
    args.height = logits.size(2);
    args.width = logits.size(3);
    args.rows = rows;
    args.columns = columns;
    args.logits = cells_of(logits);
    args.row_lines = row_lines.data();
    args.column_lines = column_lines.data();
    for (int64_t row = 0, cell = 0; cell <= args.height; ++cell) {
      while (row < rows && row_lines[row].low < cell) ++row;
      first_row.push_back(row);
    }
    args.first_row = first_row.data();
    lanes = kernels().upsampled_logits.lanes[dtype];
    padded = (args.classes + lanes - 1) / lanes * lanes;
    unit_rows = std::clamp<int64_t>(images * args.height / kUnits, 1, kUnitRows);
    units_per_image = (args.height + unit_rows - 1) / unit_rows;
  }

  int64_t units() const { return images * units_per_image; }

  UpsampledUnit unit(int64_t index) const {
    const int64_t first = index % units_per_image * unit_rows;
    return {index / units_per_image, first, std::min(first + unit_rows, args.height)};
  }

  at::Tensor memory(int64_t elements) const {
    return at::empty({elements}, at::TensorOptions().dtype(dtype == kFloat64 ? at::kDouble : at::kFloat));
  }

  // Calls body(index, scratch) for every unit.
  template <class Body>
  void for_units(const Body& body) const {
    const int64_t values = images * args.classes * args.rows * args.columns / std::max<int64_t>(units(), 1);
    at::parallel_for(0, units(), std::max<int64_t>(1, kGrain / std::max<int64_t>(values, 1)),
                     [&](int64_t begin, int64_t end) {
                       const at::Tensor scratch = memory(upsampled_scratch(args, padded, lanes));
                       for (int64_t index = begin; index < end; ++index) body(index, scratch.mutable_data_ptr());
                     });
  }

  // The losses, their sums, and the gradient, whichever `args` asks for.
  std::vector<UpsampledSums> cross_entropy() const {
    const UpsampledLogitsKernels& table = kernels().upsampled_logits;
    std::vector<UpsampledSums> sums(units());
    const bool gradient = args.gradient.data != nullptr;
    const int64_t border_size = gradient ? padded * args.width : 0;
    const at::Tensor borders = memory(units() * border_size);
    const auto border = [&](int64_t index) {
      return static_cast<char*>(borders.mutable_data_ptr()) + index * border_size * borders.element_size();
    };
    for_units([&](int64_t index, void* scratch) {
      table.cross_entropy[dtype](args, unit(index), scratch, border(index), &sums[index]);
    });
    for (const UpsampledSums& of_unit : sums)
      TORCH_CHECK_INDEX(!of_unit.has_wrong_label, "target: expected labels from 0 to ", args.classes - 1,
                        " or ignore_index, ", args.ignore_index, ", got ", of_unit.wrong_label);
    for (int64_t index = 0; gradient && index < units(); ++index)
      if (unit(index).last < args.height) table.add_border[dtype](args, unit(index), border(index));
    return sums;
  }

  Dtype dtype;
  int64_t images, units_per_image;
  UpsampledArgs args = {};

 private:
  std::vector<UpsampledLine> row_lines, column_lines;
  std::vector<int64_t> first_row;
  int64_t lanes, padded, unit_rows;
};

void check_logits(const at::Tensor& logits) {
  ANNNET_CHECK_RANK(logits, 4);
  TORCH_CHECK_VALUE(logits.size(1) > 0 && logits.size(2) > 0 && logits.size(3) > 0,
                    "logits: expected at least one class, row and column, got shape ", logits.sizes());
}

// The problem of a cross-entropy; what it needs in contiguous memory is kept in `weights`.
Problem cross_entropy_of(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& class_weight,
                         int64_t ignore_index, double label_smoothing, bool align_corners, at::Tensor& weights) {
  check_logits(logits);
  ANNNET_CHECK_RANK(target, 3);
  TORCH_CHECK_VALUE(target.size(0) == logits.size(0), "target: expected the batch of logits, ", logits.size(0),
                    ", got shape ", target.sizes());
  const at::ScalarType type = target.scalar_type();
  TORCH_CHECK_TYPE(type == at::kLong || type == at::kInt || type == at::kByte,
                   "target: expected dtype Long, Int or Byte, got ", type);
  Problem problem(logits, target.size(1), target.size(2), align_corners);
  problem.args.target = pixels_of(target);
  problem.args.label_type = type == at::kLong ? kInt64 : type == at::kInt ? kInt32 : kUint8;
  problem.args.ignore_index = ignore_index;
  problem.args.smoothing = label_smoothing;
  if (class_weight) {
    const at::Tensor weight = class_weight->contiguous();
    ANNNET_CHECK_SHAPE(weight, logits.size(1));
    ANNNET_CHECK_DTYPE(weight, accumulator(logits));
    weights = weight;
    problem.args.weight = weights.const_data_ptr();
  }
  return problem;
}

template <class T>
void add_up(const Problem& problem, const std::vector<UpsampledSums>& of_units, at::Tensor& sums) {
  T* const target = sums.mutable_data_ptr<T>();
  for (int64_t image = 0; image < problem.images; ++image) {
    double loss = 0, weight = 0;
    for (int64_t unit = 0; unit < problem.units_per_image; ++unit) {
      loss += of_units[image * problem.units_per_image + unit].loss;
      weight += of_units[image * problem.units_per_image + unit].weight;
    }
    target[2 * image] = static_cast<T>(loss);
    target[2 * image + 1] = static_cast<T>(weight);
  }
}

void upsampled_cross_entropy(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                             int64_t ignore_index, double label_smoothing, bool align_corners, bool per_pixel,
                             bool gradient, at::Tensor& losses, at::Tensor& sums, at::Tensor& unit_gradient) {
  at::Tensor weights;
  Problem problem = cross_entropy_of(logits, target, weight, ignore_index, label_smoothing, align_corners, weights);
  ANNNET_CHECK_SHAPE(sums, logits.size(0), 2);
  ANNNET_CHECK_DTYPE(sums, accumulator(logits));
  TORCH_CHECK_VALUE(sums.is_contiguous(), "sums: expected a contiguous tensor, got strides ", sums.strides());
  if (per_pixel) {
    ANNNET_CHECK_SHAPE(losses, target.size(0), target.size(1), target.size(2));
    ANNNET_CHECK_DTYPE(losses, accumulator(logits));
    TORCH_CHECK_VALUE(losses.is_contiguous(), "losses: expected a contiguous tensor, got strides ", losses.strides());
    problem.args.losses = losses.mutable_data_ptr();
  }
  if (gradient) {
    ANNNET_CHECK_SHAPE(unit_gradient, logits.size(0), logits.size(1), logits.size(2), logits.size(3));
    ANNNET_CHECK_DTYPE(unit_gradient, accumulator(logits));
    if (logits.size(0) > 0) problem.args.gradient = cells_of(unit_gradient);
  }
  const std::vector<UpsampledSums> of_units = problem.cross_entropy();
  (problem.dtype == kFloat64 ? add_up<double> : add_up<float>)(problem, of_units, sums);
}

void upsampled_cross_entropy_bwd(const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& weight,
                                 const at::Tensor& grad, int64_t ignore_index, double label_smoothing,
                                 bool align_corners, at::Tensor& dlogits) {
  at::Tensor weights;
  Problem problem = cross_entropy_of(logits, target, weight, ignore_index, label_smoothing, align_corners, weights);
  ANNNET_CHECK_SHAPE(grad, target.size(0), target.size(1), target.size(2));
  ANNNET_CHECK_DTYPE(grad, accumulator(logits));
  ANNNET_CHECK_SHAPE(dlogits, logits.size(0), logits.size(1), logits.size(2), logits.size(3));
  ANNNET_CHECK_SAME_KIND(dlogits, logits);
  if (logits.size(0) == 0) return;
  const bool wide = dlogits.scalar_type() == accumulator(logits);
  const at::Tensor gradient = wide ? dlogits : at::empty_like(dlogits, at::TensorOptions().dtype(at::kFloat));
  problem.args.grad = pixels_of(grad);
  problem.args.gradient = cells_of(gradient);
  problem.cross_entropy();
  if (!wide) dlogits.copy_(gradient);
}

void upsampled_argmax(const at::Tensor& logits, at::IntArrayRef size, bool align_corners, at::Tensor& out) {
  check_logits(logits);
  TORCH_CHECK_VALUE(size.size() == 2 && size[0] > 0 && size[1] > 0, "size: expected (H, W), got ", size);
  ANNNET_CHECK_SHAPE(out, logits.size(0), size[0], size[1]);
  ANNNET_CHECK_DTYPE(out, at::kLong);
  TORCH_CHECK_VALUE(out.is_contiguous(), "out: expected a contiguous tensor, got strides ", out.strides());
  Problem problem(logits, size[0], size[1], align_corners);
  problem.args.indices = out.mutable_data_ptr<int64_t>();
  problem.for_units([&](int64_t index, void* scratch) {
    kernels().upsampled_logits.argmax[problem.dtype](problem.args, problem.unit(index), scratch);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(annnet_native, CPU, m) {
  m.impl("upsampled_cross_entropy", &upsampled_cross_entropy);
  m.impl("upsampled_cross_entropy_bwd", &upsampled_cross_entropy_bwd);
  m.impl("upsampled_argmax", &upsampled_argmax);
}

}  // namespace annnet::upsampled_logits
