#pragma once

#include "pyramid_pool.h"
#include "vector.h"

namespace annnet::ANNNET_LEVEL {

constexpr PyramidPoolKernels pyramid_pool_kernels = {};

}  // namespace annnet::ANNNET_LEVEL
