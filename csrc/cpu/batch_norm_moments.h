// What other hosts ask of batch_norm.cpp.
#pragma once

#include <ATen/core/Tensor.h>

namespace annnet {

// moments (3, C), float64: how many values of y each channel has, their mean, and Σ (y − mean)²; zeros where there are
// none.
void batch_norm_moments(const at::Tensor& y, at::Tensor& moments);

}  // namespace annnet
