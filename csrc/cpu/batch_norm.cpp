// annnet_native::batch_norm_* on the CPU: checks, layouts and threads around the kernels, and the sums of their parts.
#include "batch_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "../checks.h"
#include "batch_norm_moments.h"
#include "levels.h"
#include "tensors.h"

namespace annnet {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Pixels of a unit, by the meaning of the lanes.
constexpr int64_t kUnitPixels[] = {4096, 256};
// Channels of a unit: their sums and constants stay in the first-level cache.
constexpr int64_t kUnitChannels = 512;
// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 1 << 15;

// Maps of one shape, the way they are walked, and the units they are cut into.
class Problem {
 public:
  // The layout of `y` decides. `grad` and `out` may be undefined.
  Problem(const at::Tensor& y, const at::Tensor& grad, const at::Tensor& out)
      : dtype(dtype_of(y, "y")), images(y.size(0)), pixels(y.size(2) * y.size(3)) {
    const bool rows_lie_together = y.size(3) == 1 || (y.stride(2) == 1 && y.stride(3) != 1);
    const int64_t line = rows_lie_together ? 3 : 2, step = rows_lie_together ? 2 : 3;
    args.channels = y.size(1);
    args.length = y.size(step);
    bool one_line = true;
    for (const auto& [x, map] : {std::pair(&y, &args.y), std::pair(&grad, &args.grad), std::pair(&out, &args.out)}) {
      if (!x->defined()) continue;
      *map = {const_cast<void*>(x->const_data_ptr()), x->stride(0), x->stride(1), x->stride(line), x->stride(step)};
      one_line = one_line && (x->size(line) == 1 || map->line == args.length * map->step);
    }
    if (one_line) args.length = pixels;
    const int64_t run = args.y.step == 1 ? args.length : 1;
    lanes = args.y.channel == 1 && args.channels > run ? kChannels : kPixels;
    chunks = (pixels + kUnitPixels[lanes] - 1) / kUnitPixels[lanes];
    if (lanes == kChannels) {
      const int64_t blocks = (args.channels + kUnitChannels - 1) / kUnitChannels;
      unit_channels = ((args.channels + blocks - 1) / blocks + 15) / 16 * 16;
    }
    blocks = (args.channels + unit_channels - 1) / unit_channels;
  }

  // Which partial sums a unit makes.
  int64_t part(const BatchNormUnit& unit) const { return unit.image * chunks + unit.first / kUnitPixels[lanes]; }
  int64_t parts() const { return images * chunks; }
  // Pixels behind a part.
  int64_t part_pixels(int64_t part) const {
    return std::min(kUnitPixels[lanes], pixels - part % chunks * kUnitPixels[lanes]);
  }

  template <class Body>
  void for_units(const Body& body) const {
    const int64_t unit_size = unit_channels * std::min(pixels, kUnitPixels[lanes]);
    at::parallel_for(0, images * chunks * blocks, std::max<int64_t>(1, kGrain / unit_size),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t index = begin; index < end; ++index) body(unit(index));
                     });
  }

  // Two rows of sums per part.
  double* sums_of(const at::Tensor& sums, const BatchNormUnit& unit) const {
    return sums.mutable_data_ptr<double>() + part(unit) * 2 * args.channels;
  }

  Dtype dtype;
  Lanes lanes;
  BatchNormArgs args = {};

 private:
  // Units that follow each other are neighbours in memory.
  BatchNormUnit unit(int64_t index) const {
    int64_t block, chunk;
    if (lanes == kChannels) {
      block = index % blocks;
      chunk = index / blocks % chunks;
    } else {
      chunk = index % chunks;
      block = index / chunks % blocks;
    }
    const int64_t channel = block * unit_channels, first = chunk * kUnitPixels[lanes];
    return {index / (blocks * chunks), channel, std::min(unit_channels, args.channels - channel), first,
            std::min(first + kUnitPixels[lanes], pixels)};
  }

  int64_t images, pixels, chunks, blocks, unit_channels = 1;
};

void check_table(const at::Tensor& table, const char* name, const at::Tensor& y, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(table.sizes() == shape, name, ": expected shape ", shape, ", got ", table.sizes());
  TORCH_CHECK_TYPE(table.scalar_type() == accumulator_of(y), name, ": expected dtype ", accumulator_of(y), ", got ",
                   table.scalar_type());
}

// What a call reads beside its maps, contiguous.
struct Tables {
  Tables(const at::Tensor& y, const at::Tensor& norm, const OptionalTensor& channel_scale,
         const OptionalTensor& mean_sums) {
    ANNNET_CHECK_RANK(y, 4);
    table = norm_of(norm, y);
    if (channel_scale) {
      check_table(*channel_scale, "channel_scale", y, {y.size(0), y.size(1)});
      factors = channel_scale->contiguous();
    }
    if (mean_sums) {
      check_table(*mean_sums, "sums", y, {2, y.size(1)});
      means = mean_sums->contiguous();
    }
  }

  void give_to(BatchNormArgs& args) const {
    args.norm = table.data;
    if (factors.defined()) args.channel_scale = factors.const_data_ptr();
    if (means.defined()) args.mean_sums = means.const_data_ptr();
  }

  NormTable table;
  at::Tensor factors, means;
};

at::Tensor memory(at::IntArrayRef shape, at::ScalarType dtype) {
  return at::empty(shape, at::TensorOptions().dtype(dtype));
}

// Calls body(begin, end) for shares of the channels, whose parts are to be added.
template <class Body>
void for_channels(const Problem& problem, const Body& body) {
  at::parallel_for(0, problem.args.channels, std::max<int64_t>(1, kGrain / problem.parts()), body);
}

// moments (3, C) from the shifts (parts, C) and the sums of the parts (parts, 2, C).
template <class T>
void merge_moments(const Problem& problem, const at::Tensor& shifts, const at::Tensor& sums, at::Tensor& moments) {
  const int64_t channels = problem.args.channels;
  const T* const first_shift = shifts.const_data_ptr<T>();
  const double* const first_sum = sums.const_data_ptr<double>();
  double* const target = moments.mutable_data_ptr<double>();
  double total = 0;
  for (int64_t part = 0; part < problem.parts(); ++part) total += static_cast<double>(problem.part_pixels(part));
  for_channels(problem, [&](int64_t begin, int64_t end) {
    double *const mean = target + channels, *const deviation = mean + channels;
    for (int64_t c = begin; c < end; ++c) target[c] = total, mean[c] = deviation[c] = 0;
    for (int64_t part = 0; part < problem.parts(); ++part) {
      const T* shift = first_shift + part * channels;
      const double* sum = first_sum + part * 2 * channels;
      const double count = static_cast<double>(problem.part_pixels(part));
      for (int64_t c = begin; c < end; ++c) mean[c] += count * shift[c] + sum[c];
    }
    for (int64_t c = begin; c < end; ++c) mean[c] /= total;
    for (int64_t part = 0; part < problem.parts(); ++part) {
      const T* shift = first_shift + part * channels;
      const double* sum = first_sum + part * 2 * channels;
      const double* squares = sum + channels;
      const double count = static_cast<double>(problem.part_pixels(part));
      for (int64_t c = begin; c < end; ++c) {
        const double rest = sum[c] / count, distance = shift[c] + rest - mean[c];
        deviation[c] += squares[c] - sum[c] * rest + distance * distance * count;
      }
    }
    for (int64_t c = begin; c < end; ++c) deviation[c] = std::max(deviation[c], 0.0);
  });
}

// out (2, C) = Σ g and Σ g·ŷ from the parts' Σ g and Σ g·(y − mean), (parts, 2, C).
template <class T>
void merge_sums(const Problem& problem, const at::Tensor& sums, at::Tensor& out) {
  const int64_t channels = problem.args.channels;
  const double* const first_sum = sums.const_data_ptr<double>();
  const T* invstd = static_cast<const T*>(problem.args.norm) + channels;
  T* target = out.mutable_data_ptr<T>();
  for_channels(problem, [&](int64_t begin, int64_t end) {
    std::vector<double> first(end), second(end);
    for (int64_t part = 0; part < problem.parts(); ++part) {
      const double* sum = first_sum + part * 2 * channels;
      for (int64_t c = begin; c < end; ++c) {
        first[c] += sum[c];
        second[c] += sum[channels + c];
      }
    }
    for (int64_t c = begin; c < end; ++c) {
      target[c] = static_cast<T>(first[c]);
      target[channels + c] = static_cast<T>(second[c] * invstd[c]);
    }
  });
}

void check_rows(const at::Tensor& out, const at::Tensor& y) {
  check_table(out, "out", y, {2, y.size(1)});
  TORCH_CHECK_VALUE(out.is_contiguous(), "out: expected a contiguous tensor, got strides ", out.strides());
}

void check_like(const at::Tensor& x, const char* name, const at::Tensor& y) {
  TORCH_CHECK_VALUE(x.sizes() == y.sizes(), name, ": expected the shape of y, ", y.sizes(), ", got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == y.scalar_type(), name, ": expected the dtype of y, ", y.scalar_type(), ", got ",
                   x.scalar_type());
}

// A module's vector (C) in double precision, `absent` where it has none.
std::vector<double> doubles_of(const OptionalTensor& vector, const char* name, const at::Tensor& y, double absent) {
  if (!vector) return std::vector<double>(y.size(1), absent);
  TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == y.size(1), name, ": expected shape [", y.size(1),
                    "], got ", vector->sizes());
  const at::Tensor wide = vector->to(at::kDouble).contiguous();
  return {wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel()};
}

template <class T>
void write_table(const double* mean, const std::vector<double>& var, const std::vector<double>& weight,
                 const std::vector<double>& bias, double eps, at::Tensor& table) {
  const int64_t channels = table.size(1);
  T* const target = table.mutable_data_ptr<T>();
  for (int64_t c = 0; c < channels; ++c) {
    target[c] = static_cast<T>(mean[c]);
    target[channels + c] = static_cast<T>(1 / std::sqrt(var[c] + eps));
    target[2 * channels + c] = static_cast<T>(weight[c]);
    target[3 * channels + c] = static_cast<T>(bias[c]);
  }
}

void check_written_table(const at::Tensor& table, const at::Tensor& y) {
  ANNNET_CHECK_RANK(y, 4);
  check_table(table, "table", y, {4, y.size(1)});
  TORCH_CHECK_VALUE(table.is_contiguous(), "table: expected a contiguous tensor, got strides ", table.strides());
}

void batch_norm_table(const at::Tensor& y, const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& conv_bias, double eps, at::Tensor& table) {
  check_written_table(table, y);
  std::vector<double> means = doubles_of(mean, "mean", y, 0);
  const std::vector<double> shift = doubles_of(conv_bias, "conv_bias", y, 0);
  for (size_t c = 0; c < means.size(); ++c) means[c] -= shift[c];
  const auto write = table.scalar_type() == at::kDouble ? write_table<double> : write_table<float>;
  write(means.data(), doubles_of(var, "var", y, 1), doubles_of(weight, "weight", y, 1), doubles_of(bias, "bias", y, 0),
        eps, table);
}

void batch_norm_update(const at::Tensor& y, const OptionalTensor& moments, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& conv_bias, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& count, double eps,
                       std::optional<double> momentum, int64_t calls, at::Tensor& table) {
  check_written_table(table, y);
  const int64_t channels = y.size(1);
  at::Tensor found = moments ? moments->contiguous() : memory({3, channels}, at::kDouble);
  if (!moments) batch_norm_moments(y, found);
  ANNNET_CHECK_SHAPE(found, 3, channels);
  ANNNET_CHECK_DTYPE(found, at::kDouble);
  const double *const values = found.const_data_ptr<double>(), *const mean = values + channels,
                      *const deviation = mean + channels;
  std::vector<double> var(channels);
  for (int64_t c = 0; c < channels; ++c) var[c] = deviation[c] / std::max(values[c], 1.0);
  const auto write = table.scalar_type() == at::kDouble ? write_table<double> : write_table<float>;
  write(mean, var, doubles_of(weight, "weight", y, 1), doubles_of(bias, "bias", y, 0), eps, table);

  const auto move = [&](const OptionalTensor& running, const char* name, const auto& statistic) {
    if (!running) return;
    std::vector<double> moved = doubles_of(running, name, y, 0);
    for (int64_t call = 1; call <= calls; ++call) {
      const double factor = momentum ? *momentum : count ? 1 / static_cast<double>(count->item<int64_t>() + call) : 0.0;
      for (int64_t c = 0; c < channels; ++c)
        if (values[c] > 0) moved[c] += (statistic(c) - moved[c]) * factor;
    }
    running->copy_(at::from_blob(moved.data(), {channels}, at::TensorOptions().dtype(at::kDouble)));
  };
  const std::vector<double> shift = doubles_of(conv_bias, "conv_bias", y, 0);
  move(running_mean, "running_mean", [&](int64_t c) { return mean[c] + shift[c]; });
  move(running_var, "running_var", [&](int64_t c) { return deviation[c] / (values[c] - 1); });
  if (count) count->add_(calls);
}

void batch_norm_apply(const at::Tensor& y, const at::Tensor& norm, const OptionalTensor& channel_scale, bool relu,
                      at::Tensor& out) {
  const Tables tables(y, norm, channel_scale, {});
  check_like(out, "out", y);
  if (y.numel() == 0) return;
  Problem problem(y, {}, out);
  tables.give_to(problem.args);
  const auto kernel = kernels().batch_norm.apply[relu][problem.lanes][problem.dtype];
  problem.for_units([&](const BatchNormUnit& unit) { kernel(problem.args, unit); });
}

void batch_norm_bwd_sums(const at::Tensor& grad_out, const at::Tensor& y, const at::Tensor& norm,
                         const OptionalTensor& channel_scale, bool relu, at::Tensor& out) {
  const Tables tables(y, norm, channel_scale, {});
  check_like(grad_out, "grad_out", y);
  check_rows(out, y);
  if (y.numel() == 0) {
    out.zero_();
    return;
  }
  Problem problem(y, grad_out, {});
  tables.give_to(problem.args);
  const at::Tensor sums = memory({problem.parts(), 2, problem.args.channels}, at::kDouble);
  const auto kernel = kernels().batch_norm.sums[relu][problem.lanes][problem.dtype];
  problem.for_units([&](const BatchNormUnit& unit) { kernel(problem.args, unit, problem.sums_of(sums, unit)); });
  (problem.dtype == kFloat64 ? merge_sums<double> : merge_sums<float>)(problem, sums, out);
}

void batch_norm_bwd_input(const at::Tensor& grad_out, const at::Tensor& y, const at::Tensor& norm,
                          const OptionalTensor& channel_scale, bool relu, const OptionalTensor& sums, int64_t count,
                          at::Tensor& dy) {
  const Tables tables(y, norm, channel_scale, sums ? OptionalTensor(sums->div(count)) : sums);
  check_like(grad_out, "grad_out", y);
  check_like(dy, "dy", y);
  if (y.numel() == 0) return;
  Problem problem(y, grad_out, dy);
  tables.give_to(problem.args);
  const auto kernel = kernels().batch_norm.input[sums.has_value()][relu][problem.lanes][problem.dtype];
  problem.for_units([&](const BatchNormUnit& unit) { kernel(problem.args, unit); });
}

}  // namespace

void batch_norm_moments(const at::Tensor& y, at::Tensor& moments) {
  ANNNET_CHECK_RANK(y, 4);
  ANNNET_CHECK_SHAPE(moments, 3, y.size(1));
  ANNNET_CHECK_DTYPE(moments, at::kDouble);
  TORCH_CHECK_VALUE(moments.is_contiguous(), "moments: expected a contiguous tensor, got strides ", moments.strides());
  if (y.numel() == 0) {
    moments.zero_();
    return;
  }
  const Problem problem(y, {}, {});
  const int64_t channels = problem.args.channels;
  const at::Tensor shifts = memory({problem.parts(), channels}, accumulator_of(y));
  const at::Tensor sums = memory({problem.parts(), 2, channels}, at::kDouble);
  char* const first_shift = static_cast<char*>(shifts.mutable_data_ptr());
  const int64_t bytes = channels * static_cast<int64_t>(shifts.element_size());
  const auto kernel = kernels().batch_norm.moments[problem.lanes][problem.dtype];
  problem.for_units([&](const BatchNormUnit& unit) {
    kernel(problem.args, unit, first_shift + problem.part(unit) * bytes, problem.sums_of(sums, unit));
  });
  (problem.dtype == kFloat64 ? merge_moments<double> : merge_moments<float>)(problem, shifts, sums, moments);
}

TORCH_LIBRARY_IMPL(annnet_native, CPU, m) {
  m.impl("batch_norm_moments", &batch_norm_moments);
  m.impl("batch_norm_table", &batch_norm_table);
  m.impl("batch_norm_update", &batch_norm_update);
  m.impl("batch_norm_apply", &batch_norm_apply);
  m.impl("batch_norm_bwd_sums", &batch_norm_bwd_sums);
  m.impl("batch_norm_bwd_input", &batch_norm_bwd_input);
}

}  // namespace annnet
