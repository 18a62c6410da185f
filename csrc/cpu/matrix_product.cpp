// annnet_native::matrix_product and pointwise_convolution with its backward, float32: checks, and pieces of the product
// over threads.
#include "matrix_product.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <optional>

#include "../checks.h"
#include "levels.h"

namespace annnet {

namespace {

constexpr int64_t kPackedPanels = 8;  // panels that are worth a thread

at::Tensor floats(int64_t count) { return at::empty({count}, at::TensorOptions().dtype(at::kFloat)); }

// A product of at most the kernels' depth.
void run(MatrixProduct args) {
  const MatrixProductKernels& kernel = kernels().matrix_product;
  args.plan = kernel.plan(args, at::get_num_threads());
  const at::Tensor packed = floats(args.plan.packed_floats);
  args.packed = packed.mutable_data_ptr<float>();
  at::parallel_for(0, args.plan.packed_images * args.plan.packed_panels, kPackedPanels,
                   [&](int64_t begin, int64_t end) { kernel.pack(args, begin, end); });
  const at::Tensor scratch = floats(at::get_num_threads() * args.plan.scratch_floats);
  at::parallel_for(0, args.images * args.plan.row_pieces * args.plan.column_pieces, 1, [&](int64_t begin, int64_t end) {
    float* const own = scratch.mutable_data_ptr<float>() + at::get_thread_num() * args.plan.scratch_floats;
    kernel.multiply(args, own, begin, end);
  });
}

// A product of any depth, in nearly equal runs.
void multiply(const MatrixProduct& args) {
  const int64_t most = kernels().matrix_product.most_depth, runs = (args.depth + most - 1) / most;
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t begin = args.depth * i / runs, end = args.depth * (i + 1) / runs;
    MatrixProduct part = args;
    part.depth = end - begin;
    part.a.data += begin * args.a.column;
    part.b.data += begin * args.b.row;
    if (i > 0) {
      part.add = true;
      part.bias = nullptr;
    }
    run(part);
  }
}

Matrix matrix_of(const at::Tensor& x) { return {x.const_data_ptr<float>(), x.stride(1), x.stride(2), x.stride(0)}; }

void matrix_product(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias, bool summed,
                    const at::Tensor& out) {
  ANNNET_CHECK_RANK(a, 3);
  ANNNET_CHECK_RANK(b, 3);
  ANNNET_CHECK_DTYPE(a, at::kFloat);
  ANNNET_CHECK_SAME_KIND(b, a);
  ANNNET_CHECK_SHAPE(b, a.size(0), a.size(2), b.size(2));
  ANNNET_CHECK_SHAPE(out, summed ? 1 : a.size(0), a.size(1), b.size(2));
  ANNNET_CHECK_SAME_KIND(out, a);
  TORCH_CHECK_VALUE(out.is_contiguous(), "out: expected contiguous, got strides ", out.strides());
  at::Tensor constant;
  if (bias) {
    ANNNET_CHECK_SHAPE(*bias, a.size(1));
    ANNNET_CHECK_SAME_KIND(*bias, a);
    constant = bias->contiguous();
  }
  if (out.numel() == 0) return;
  if (a.numel() == 0) {  // nothing to sum
    bias ? out.copy_(constant.view({1, -1, 1}).expand_as(out)) : out.zero_();
    return;
  }
  MatrixProduct args = {.images = a.size(0), .rows = a.size(1), .columns = b.size(2), .depth = a.size(2)};
  args.a = matrix_of(a);
  args.b = matrix_of(b);
  args.c = out.mutable_data_ptr<float>();
  args.c_image = out.stride(0);
  args.bias = bias ? constant.const_data_ptr<float>() : nullptr;
  if (!summed) return multiply(args);
  const int64_t images = args.images;
  args.images = 1;
  for (int64_t image = 0; image < images; ++image) {
    multiply(args);
    args.a.data += args.a.image;
    args.b.data += args.b.image;
    args.add = true;
    args.bias = nullptr;
  }
}

// Maps as matrices (B, channels, pixels), weights as (B, channels out, channels in).
void check_convolution(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& out) {
  ANNNET_CHECK_RANK(x, 4);
  ANNNET_CHECK_DTYPE(x, at::kFloat);
  ANNNET_CHECK_RANK(weight, 4);
  ANNNET_CHECK_SHAPE(weight, weight.size(0), x.size(1), 1, 1);
  ANNNET_CHECK_SHAPE(out, x.size(0), weight.size(0), x.size(2), x.size(3));
}

// Its pixels are one dimension without a copy.
void check_dense(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.is_contiguous(), name, ": expected dense NCHW, got strides ", x.strides());
}

at::Tensor matrices_of(const at::Tensor& weight, int64_t images) { return weight.flatten(1).expand({images, -1, -1}); }

void pointwise_convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const at::Tensor& out) {
  check_convolution(x, weight, out);
  check_dense(out, "out");
  matrix_product(matrices_of(weight, x.size(0)), x.flatten(2), bias, false, out.flatten(2));
}

void pointwise_convolution_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                               std::array<bool, 3> needs, const at::Tensor& dx, const at::Tensor& dweight,
                               const at::Tensor& dbias) {
  check_convolution(x, weight, grad);
  const at::Tensor pixels = grad.flatten(2);
  if (needs[0]) {
    check_dense(dx, "dx");
    const at::Tensor transposed = matrices_of(weight, x.size(0)).transpose(1, 2);
    matrix_product(transposed, pixels, std::nullopt, false, dx.flatten(2));
  }
  if (needs[1])
    matrix_product(pixels, x.flatten(2).transpose(1, 2), std::nullopt, true,
                   dweight.view({1, weight.size(0), x.size(1)}));
  if (needs[2]) {
    at::Tensor sums = dbias;
    at::sum_out(sums, grad, {0, 2, 3});
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(annnet_native, CPU, m) {
  m.impl("matrix_product", matrix_product);
  m.impl("pointwise_convolution", pointwise_convolution);
  m.impl("pointwise_convolution_bwd", pointwise_convolution_bwd);
}

}  // namespace annnet
