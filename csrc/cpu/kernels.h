// The table of all CPU kernels of one instruction level. Plain C types only: see levels.h.
#pragma once

#include "asymmetric_attention.h"
#include "batch_norm.h"
#include "bn_relu_pool.h"
#include "pyramid_pool.h"
#include "upsampled_logits.h"

namespace annnet {

struct Kernels {
  AsymmetricAttentionKernels asymmetric_attention;
  BatchNormKernels batch_norm;
  BnReluPoolKernels bn_relu_pool;
  PyramidPoolKernels pyramid_pool;
  UpsampledLogitsKernels upsampled_logits;
};

}  // namespace annnet
