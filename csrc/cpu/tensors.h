// What the hosts of the CPU kernels share: tensors as plain pointers, sizes and strides.
#pragma once

#include <ATen/core/Tensor.h>

#include "dtypes.h"

namespace annnet {

// The number of a tensor's dtype in the tables of kernels; `name` is the argument that an error names.
inline Dtype dtype_of(const at::Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, ": expected dtype float32, float64, bfloat16 or float16, got ", x.scalar_type());
  }
}

}  // namespace annnet
