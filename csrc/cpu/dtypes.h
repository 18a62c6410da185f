// Element types by number, for tables of kernels. Plain C types only: see levels.h.
#pragma once

namespace annnet {

enum Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kDtypes };

}  // namespace annnet
