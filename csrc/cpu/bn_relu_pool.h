// Arguments and table of the kernels for the gradient of a normalised, rectified map. Plain C types only: see levels.h.
//
// The map is walked as by the pooling (pyramid_pool.h), whose gradient is one of the two contributions.
#pragma once

#include "pyramid_pool.h"

namespace annnet {

struct BnReluArgs {
  PoolArgs pool;  // pool.map is y, pool.norm its normalisation, pool.tokens the gradient of the tokens if has_tokens
  bool has_tokens, has_map;
  PoolMap grad_map;       // if has_map
  const void* mean_sums;  // (2, C) accumulators, or null where the statistics are frozen
  PoolMap dy;
};

struct BnReluPoolKernels {
  // Σ g and Σ g·ŷ of the row segments first … last - 1 of a unit: 2 × block accumulators per row segment.
  using Sums = void (*)(const BnReluArgs&, PoolUnit, int64_t first, int64_t last, void* sums, void* scratch);
  // dy of the row segments first … last - 1 of a unit.
  using Input = void (*)(const BnReluArgs&, PoolUnit, int64_t first, int64_t last, void* scratch);

  Sums sums_rows[kDtypes];      // any map; fast if y and grad_map have neighbouring columns
  Sums sums_channels[kDtypes];  // pool.map.channel is 1
  Input input_rows[kDtypes];
  Input input_channels[kDtypes];
};

}  // namespace annnet
