// The pooling on a GPU: plain types between the checks (pyramid_pool.cpp, no nvcc) and the launches (pyramid_pool.cu,
// no PyTorch).
#pragma once

#include <driver_types.h>
#include <stdint.h>

#include "../cpu/dtypes.h"

namespace annnet::cuda {

// Strides are in elements. `map` is read by the forward and written by the backward, `tokens` the other way round.
struct PoolCall {
  Dtype dtype;
  int64_t images, channels, height, width;
  void* map;
  const int64_t* map_strides;  // batch, channel, row, column
  void* tokens;
  const int64_t* token_strides;  // batch, channel, token
  int levels;
  const int64_t *heights, *widths;
};

// Uninitialised device memory that lasts until the work launched so far is done.
struct Scratch {
  virtual void* allocate(int64_t bytes) = 0;
};

cudaError_t pyramid_pool(const PoolCall& call, Scratch& scratch, cudaStream_t stream);
cudaError_t pyramid_pool_bwd(const PoolCall& call, cudaStream_t stream);

}  // namespace annnet::cuda
