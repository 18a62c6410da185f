// The table of all CPU kernels of one instruction level. Plain C types only: see levels.h.
#pragma once

#include "asymmetric_attention.h"
#include "pyramid_pool.h"

namespace annnet {

struct Kernels {
  AsymmetricAttentionKernels asymmetric_attention;
  PyramidPoolKernels pyramid_pool;
};

}  // namespace annnet
