// Pooling by a thread per token and a thread per pixel, for what is too large for a PoolPlan or for shared memory: very
// many bins, very long rows. The map is read once per level.
#pragma once

#include "pool_args.h"

namespace annnet::cuda {

constexpr int kDirectLevels = 128;

struct DirectLevel {
  int64_t rows, columns, token;
};

struct DirectArgs {
  PoolMap map;
  PoolTokens tokens;
  int64_t count;  // threads
  int64_t channels, height, width, n_tokens;
  int levels;
  DirectLevel level[kDirectLevels];
};
static_assert(sizeof(DirectArgs) < 4096);

__device__ inline int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// Threads: images × tokens × channels, channels innermost.
template <class T>
__global__ void __launch_bounds__(kThreads) pool_direct_kernel(const __grid_constant__ DirectArgs args) {
  const int64_t index = global_thread();
  if (index >= args.count) return;
  const int64_t channel = index % args.channels, token = index / args.channels % args.n_tokens;
  const int64_t image = index / args.channels / args.n_tokens;
  int l = 0;
  while (l + 1 < args.levels && args.level[l + 1].token <= token) ++l;
  const DirectLevel& level = args.level[l];
  const int64_t i = (token - level.token) / level.columns, j = (token - level.token) % level.columns;
  const int64_t top = bin_start(i, args.height, level.rows), bottom = bin_end(i, args.height, level.rows);
  const int64_t left = bin_start(j, args.width, level.columns), right = bin_end(j, args.width, level.columns);
  const T* from = static_cast<const T*>(args.map.data) + image * args.map.batch + channel * args.map.channel;
  Sum<T> total = 0;
  for (int64_t y = top; y < bottom; ++y) {
    Sum<T> row = 0;  // a sum of sums: the error of one long sum would grow with the map
    for (int64_t x = left; x < right; ++x) row += widen(__ldcs(from + y * args.map.row + x * args.map.column));
    total += row;
  }
  T* to = static_cast<T*>(args.tokens.data) + image * args.tokens.batch;
  to[channel * args.tokens.channel + token * args.tokens.token] =
      narrow<T>(total / (Sum<T>(bottom - top) * Sum<T>(right - left)));
}

// Threads: images × channels × rows × columns, columns innermost. The 1 lets it use all registers: its divisions in 64
// bits spill for sm_100 otherwise.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) pool_direct_bwd_kernel(const __grid_constant__ DirectArgs args) {
  const int64_t index = global_thread();
  if (index >= args.count) return;
  const int64_t x = index % args.width, y = index / args.width % args.height;
  const int64_t plane = index / args.width / args.height;
  const int64_t channel = plane % args.channels, image = plane / args.channels;
  const T* from = static_cast<const T*>(args.tokens.data) + image * args.tokens.batch + channel * args.tokens.channel;
  Sum<T> total = 0;
  for (int l = 0; l < args.levels; ++l) {
    const DirectLevel& level = args.level[l];
    const int64_t end_i = last_holder(y, args.height, level.rows);
    const int64_t end_j = last_holder(x, args.width, level.columns);
    for (int64_t i = first_holder(y, args.height, level.rows); i < end_i; ++i) {
      const int64_t rows = bin_end(i, args.height, level.rows) - bin_start(i, args.height, level.rows);
      for (int64_t j = first_holder(x, args.width, level.columns); j < end_j; ++j) {
        const int64_t columns = bin_end(j, args.width, level.columns) - bin_start(j, args.width, level.columns);
        const int64_t token = level.token + i * level.columns + j;
        total += widen(from[token * args.tokens.token]) / (Sum<T>(rows) * Sum<T>(columns));
      }
    }
  }
  T* to = static_cast<T*>(args.map.data) + image * args.map.batch + channel * args.map.channel;
  to[y * args.map.row + x * args.map.column] = narrow<T>(total);
}

}  // namespace annnet::cuda
