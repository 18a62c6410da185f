// What the hosts of the CPU kernels share: tensors as plain pointers, sizes and strides.
#pragma once

#include <ATen/core/Tensor.h>

#include "../checks.h"
#include "dtypes.h"
#include "pyramid_pool.h"

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

// The dtype of sums, statistics and tables beside a map.
inline at::ScalarType accumulator_of(const at::Tensor& map) {
  return map.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The table (4, C) of a norm of the map `y`.
inline NormTable norm_of(const at::Tensor& norm, const at::Tensor& y) {
  ANNNET_CHECK_SHAPE(norm, 4, y.size(1));
  ANNNET_CHECK_DTYPE(norm, accumulator_of(y));
  TORCH_CHECK_VALUE(norm.is_contiguous(), "norm: expected a contiguous table, got strides ", norm.strides());
  return {norm.const_data_ptr(), y.size(1)};
}

}  // namespace annnet
