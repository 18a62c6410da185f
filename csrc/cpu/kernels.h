// The table of all CPU kernels of one instruction level. Plain C types only: see levels.h.
#pragma once

#include "pyramid_pool.h"

namespace annnet {

struct Kernels {
  PyramidPoolKernels pyramid_pool;
};

}  // namespace annnet
