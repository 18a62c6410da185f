// Compiles every kernel for the level ANNNET_LEVEL; included by levels/*.cpp under that level's target.
#include "kernels.h"
#include "pyramid_pool_kernels.h"
#include "vector.h"

namespace annnet::ANNNET_LEVEL {

extern const Kernels kernels;
const Kernels kernels = {
    .pyramid_pool = pyramid_pool_kernels,
};

}  // namespace annnet::ANNNET_LEVEL
