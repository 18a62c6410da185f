// Arguments and table of the pooling kernels. Plain C types only: see levels.h.
#pragma once

#include "dtypes.h"

namespace annnet {

struct PyramidPoolKernels {};

}  // namespace annnet
