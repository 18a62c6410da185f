// Pooling of maps whose channels are neighbours in memory (channels_last).
//
// A block owns a chunk of the channels of one image and a part of its rows. Its threads are lanes × workers: a lane has
// N neighbouring channels, a worker a run of columns. A thread sums the pixels of a cell that lie in its columns by
// itself, so nothing waits for anything until a row segment is read.
#pragma once

#include "pool_args.h"

namespace annnet::cuda {

// Grid: images × parts × chunks, chunks innermost: blocks that follow each other read neighbouring memory.
template <int N>
struct ChannelsBlock {
  int lane, width, channel;  // `width` channels from `channel` on are the block's; N from `channel + lane` the thread's
  PoolRows rows;
  int left, right, worker;
  int64_t image;

  __device__ explicit ChannelsBlock(const PoolArgs& args)
      : lane(threadIdx.x % args.lanes * N),
        width(args.lanes * N),
        channel(blockIdx.x % args.chunks * width),
        rows(args, blockIdx.x / args.chunks % args.parts) {
    image = blockIdx.x / args.chunks / args.parts;
    worker = threadIdx.x / args.lanes;
    left = min(worker * args.part_columns, args.plan.columns.length);
    right = min(left + args.part_columns, args.plan.columns.length);
  }

  __device__ bool has_channels(const PoolArgs& args) const { return channel + lane < args.channels; }
};

constexpr int kAhead = 4;  // loads of a thread in flight

template <class T, int N>
__device__ inline void add_rectangle(const T* from, int64_t row_stride, int64_t column_stride, int rows, int columns,
                                     Sum<T> (&sum)[N]) {
  const int count = rows * columns;
  const int64_t next_row = row_stride - (columns - 1) * column_stride;
  int x = 0;
  for (int done = 0; done < count; done += kAhead) {
    Word<T, N> words[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (done + i >= count) break;
      words[i] = __ldcs(reinterpret_cast<const Word<T, N>*>(from));
      const bool ends_row = ++x == columns;
      x = ends_row ? 0 : x;
      from += ends_row ? next_row : column_stride;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (done + i < count) add<T, N>(words[i], sum);
  }
}

// strips = sums of the column bins of every row piece. Shared memory: slots(part_columns) × width sums.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) pool_channels_kernel(const __grid_constant__ PoolArgs args) {
  const ChannelsBlock<N> block(args);
  const PoolAxis &rows = args.plan.rows, &columns = args.plan.columns;
  const PoolMap& map = args.map;
  Sum<T>* pieces = reinterpret_cast<Sum<T>*>(shared_memory);
  const T* origin = static_cast<const T*>(map.data) + block.image * map.batch + block.channel + block.lane;
  Sum<T>* strips = static_cast<Sum<T>*>(args.strips.data) + block.image * args.strips.batch + block.channel;

  for (int i = threadIdx.x; i < columns.slots(args.part_columns) * block.width; i += blockDim.x) pieces[i] = 0;
  __syncthreads();
  for (int row = block.rows.first; row < block.rows.last; ++row) {
    const int top = block.rows.begin(rows, row), bottom = block.rows.end(rows, row);
    if (block.left < block.right && block.has_channels(args)) {
      for (int column = columns.segment_at(block.left); column < columns.segments && columns.cut[column] < block.right;
           ++column) {
        const int left = max(columns.cut[column], block.left), right = min(columns.cut[column + 1], block.right);
        Sum<T> sum[N] = {};
        add_rectangle<T, N>(origin + top * map.row + left * map.column, map.row, map.column, bottom - top, right - left,
                            sum);
        Sum<T>* piece = pieces + (block.worker + column) * block.width + block.lane;
#pragma unroll
        for (int i = 0; i < N; ++i) piece[i] = sum[i];
      }
    }
    __syncthreads();
    const int slot = block.rows.part + row;
    const bool clears = row == block.rows.first && block.rows.leaves_slot_empty(rows);
    for (int item = threadIdx.x; item < columns.bins * block.width; item += blockDim.x) {
      const int bin = item / block.width, channel = item % block.width;
      if (block.channel + channel >= args.channels) continue;
      Sum<T> total = 0;
      for (int i = columns.first_slot(bin, args.part_columns); i <= columns.last_slot(bin, args.part_columns); ++i)
        total += pieces[i * block.width + channel];
      Sum<T>* strip = strips + slot * args.strips.slot + bin * args.strips.bin + channel;
      *strip = total;
      if (clears) *(strip - args.strips.slot) = 0;
    }
    __syncthreads();
  }
}

// dx = the gradients of the tokens, spread. Shared memory: bins × width sums.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) pool_channels_bwd_kernel(const __grid_constant__ PoolArgs args) {
  const ChannelsBlock<N> block(args);
  const PoolAxis &rows = args.plan.rows, &columns = args.plan.columns;
  const PoolMap& map = args.map;
  Sum<T>* gradients = reinterpret_cast<Sum<T>*>(shared_memory);
  T* origin = static_cast<T*>(map.data) + block.image * map.batch + block.channel + block.lane;
  const T* tokens = static_cast<const T*>(args.tokens.data) + block.image * args.tokens.batch;

  for (int row = block.rows.first; row < block.rows.last; ++row) {
    for (int item = threadIdx.x; item < columns.bins * block.width; item += blockDim.x) {
      const int bin = item / block.width, channel = block.channel + item % block.width;
      if (channel < args.channels)
        gradients[item] = row_gradient(args, tokens + channel * args.tokens.channel, row, bin);
    }
    __syncthreads();
    const int top = block.rows.begin(rows, row), bottom = block.rows.end(rows, row);
    if (block.left < block.right && block.has_channels(args)) {
      for (int column = columns.segment_at(block.left); column < columns.segments && columns.cut[column] < block.right;
           ++column) {
        Sum<T> sum[N] = {};
        for (int h = columns.holder_start[column]; h < columns.holder_start[column + 1]; ++h) {
          const Sum<T>* gradient = gradients + columns.holders[h] * block.width + block.lane;
#pragma unroll
          for (int i = 0; i < N; ++i) sum[i] += gradient[i];
        }
        const Word<T, N> word = rounded<T, N>(sum);
        const int left = max(columns.cut[column], block.left), right = min(columns.cut[column + 1], block.right);
        for (int y = top; y < bottom; ++y) {
          T* to = origin + y * map.row + left * map.column;
          for (int x = left; x < right; ++x, to += map.column) *reinterpret_cast<Word<T, N>*>(to) = word;
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace annnet::cuda
