// The second kernel of the forward: tokens from the sums of column bins, rows added in their order.
#pragma once

#include "pool_args.h"

namespace annnet::cuda {

constexpr int kTile = 32;  // channels and tokens of a block

// Grid: images × tiles of channels × tiles of tokens, tokens innermost. Sums are read along whichever of channels and
// tokens are neighbours, and tokens written along the channels.
template <class T>
__global__ void __launch_bounds__(kThreads) pool_finish_kernel(const __grid_constant__ PoolArgs args) {
  const PoolPlan& plan = args.plan;
  const int token_tiles = (plan.tokens + kTile - 1) / kTile, channel_tiles = (args.channels + kTile - 1) / kTile;
  const int first_token = blockIdx.x % token_tiles * kTile;
  const int first_channel = blockIdx.x / token_tiles % channel_tiles * kTile;
  const int n_tokens = min(kTile, plan.tokens - first_token), n_channels = min(kTile, args.channels - first_channel);
  const int64_t image = blockIdx.x / token_tiles / channel_tiles;
  const Sum<T>* strips = static_cast<const Sum<T>*>(args.strips.data) + image * args.strips.batch;
  T* tokens = static_cast<T*>(args.tokens.data) + image * args.tokens.batch;
  auto& tile = *reinterpret_cast<Sum<T>(*)[kTile][kTile + 1]>(shared_memory);  // + 1: columns in different banks

  for (int item = threadIdx.x; item < kTile * kTile; item += blockDim.x) {
    const int fast = item % kTile, slow = item / kTile;
    const int t = args.strips.channel == 1 ? slow : fast, c = args.strips.channel == 1 ? fast : slow;
    if (t >= n_tokens || c >= n_channels) continue;
    const PoolToken token(plan, first_token + t);
    const Sum<T>* strip = strips + (first_channel + c) * args.strips.channel + token.column_bin * args.strips.bin;
    Sum<T> total = 0;
    const int last = plan.rows.last_slot(token.row_bin, args.part_rows);
    for (int slot = plan.rows.first_slot(token.row_bin, args.part_rows); slot <= last; ++slot)
      total += strip[slot * args.strips.slot];
    const int rows = plan.rows.bin_length(token.row_bin), columns = plan.columns.bin_length(token.column_bin);
    tile[t][c] = total / (Sum<T>(rows) * Sum<T>(columns));
  }
  __syncthreads();
  for (int item = threadIdx.x; item < kTile * kTile; item += blockDim.x) {
    const int t = item / kTile, c = item % kTile;
    if (t >= n_tokens || c >= n_channels) continue;
    const int64_t place = PoolToken(plan, first_token + t).place;
    tokens[place * args.tokens.token + (first_channel + c) * args.tokens.channel] = narrow<T>(tile[t][c]);
  }
}

}  // namespace annnet::cuda
