// annnet_native::pyramid_pool and pyramid_pool_bwd on CUDA: checks, device, stream and scratch.
#include "pyramid_pool.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "../checks.h"
#include "../cpu/tensors.h"

namespace annnet::cuda {

namespace {

struct TensorScratch : Scratch {
  explicit TensorScratch(at::Device device) : options(at::TensorOptions().dtype(at::kByte).device(device)) {}

  void* allocate(int64_t bytes) override {
    memory = at::empty({bytes}, options);
    return memory.mutable_data_ptr();
  }

  at::TensorOptions options;
  at::Tensor memory;
};

PoolCall call_of(const at::Tensor& map, const at::Tensor& tokens, at::IntArrayRef heights, at::IntArrayRef widths) {
  return {
      .dtype = dtype_of(map, "map"),
      .images = map.size(0),
      .channels = map.size(1),
      .height = map.size(2),
      .width = map.size(3),
      .map = const_cast<void*>(map.const_data_ptr()),
      .map_strides = map.strides().data(),
      .tokens = const_cast<void*>(tokens.const_data_ptr()),
      .token_strides = tokens.strides().data(),
      .levels = static_cast<int>(heights.size()),
      .heights = heights.data(),
      .widths = widths.data(),
  };
}

// A map with a norm is finished first, in the dtype of its table, by PyTorch: no block runs here where Triton serves.
void pool(const at::Tensor& x, const std::optional<at::Tensor>& norm, at::IntArrayRef heights, at::IntArrayRef widths,
          at::Tensor& out) {
  ANNNET_CHECK_RANK(x, 4);
  check_tokens(out, heights, widths, x.size(0), x.size(1));
  ANNNET_CHECK_SAME_KIND(out, x);
  if (x.numel() == 0) return;
  if (norm) {
    ANNNET_CHECK_SHAPE(*norm, 4, x.size(1));
    const at::Tensor columns = norm->unsqueeze(-1).unsqueeze(-1);
    const at::Tensor centred = x.to(norm->scalar_type()).sub(columns[0]);
    const at::Tensor finished = centred.mul(columns[1]).mul(columns[2]).add(columns[3]).relu();
    at::Tensor tokens = at::empty_like(out, out.options().dtype(norm->scalar_type()));
    pool(finished, std::nullopt, heights, widths, tokens);
    out.copy_(tokens);
    return;
  }
  const c10::cuda::CUDAGuard guard(x.device());
  TensorScratch scratch(x.device());
  C10_CUDA_CHECK(pyramid_pool(call_of(x, out, heights, widths), scratch, c10::cuda::getCurrentCUDAStream()));
}

void spread(const at::Tensor& grad, const std::optional<at::Tensor>& addend, at::IntArrayRef map_size,
            at::IntArrayRef heights, at::IntArrayRef widths, bool channels_last, at::Tensor& dx) {
  ANNNET_CHECK_RANK(grad, 3);
  TORCH_CHECK_VALUE(map_size.size() == 2, "map_size: expected (H, W), got ", map_size);
  check_tokens(grad, heights, widths, grad.size(0), grad.size(1));
  ANNNET_CHECK_SHAPE(dx, grad.size(0), grad.size(1), map_size[0], map_size[1]);
  ANNNET_CHECK_SAME_KIND(dx, grad);
  if (dx.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(grad.device());
  at::Tensor target = addend ? at::empty_like(dx) : dx;
  C10_CUDA_CHECK(pyramid_pool_bwd(call_of(target, grad, heights, widths), c10::cuda::getCurrentCUDAStream()));
  if (addend) dx.copy_(addend->add(target));
}

}  // namespace

TORCH_LIBRARY_IMPL(annnet_native, CUDA, m) {
  m.impl("pyramid_pool", &pool);
  m.impl("pyramid_pool_bwd", &spread);
}

}  // namespace annnet::cuda
