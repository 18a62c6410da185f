// Compiles every kernel for the level ANNNET_LEVEL; included by levels/*.cpp under that level's target.
#include "asymmetric_attention_kernels.h"
#include "batch_norm_kernels.h"
#include "bn_relu_pool_kernels.h"
#include "kernels.h"
#include "pyramid_pool_kernels.h"
#include "upsampled_logits_kernels.h"
#include "vector.h"

namespace annnet::ANNNET_LEVEL {

extern const Kernels kernels;
const Kernels kernels = {
    .asymmetric_attention = asymmetric_attention_kernels,
    .batch_norm = batch_norm::table,
    .bn_relu_pool = bn_relu_pool_kernels,
    .pyramid_pool = pyramid_pool_kernels,
    .upsampled_logits = upsampled::table,
};

}  // namespace annnet::ANNNET_LEVEL
