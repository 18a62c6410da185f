// Pooling of maps whose channels are planes (NCHW), and of maps with any strides.
//
// A block owns a part of the rows of one channel. Where rows lie without gaps they are one run of memory, which is
// copied to or from shared memory 16 bytes at a time, wherever in it a row begins: at 97 × 97 pixels every second row
// starts at an odd element. The copies in are asynchronous: a thread has all of its own in flight at once.
#pragma once

#include <cuda_pipeline.h>

#include "pool_args.h"

namespace annnet::cuda {

struct PlanesBlock {
  PoolRows rows;
  int channel;
  int64_t image;

  // Grid: images × channels × parts, parts innermost.
  __device__ explicit PlanesBlock(const PoolArgs& args)
      : rows(args, blockIdx.x % args.parts),
        channel(blockIdx.x / args.parts % args.channels),
        image(blockIdx.x / args.parts / args.channels) {}

  template <class T>
  __device__ T* origin(const PoolMap& map) const {
    return static_cast<T*>(map.data) + image * map.batch + channel * map.channel + rows.top * map.row;
  }
};

// Calls body(i, element) for the elements of a block and vector(i) for every 16 bytes of them, `i` counting elements.
// `staged` in shared memory has the alignment of `origin` to 16 bytes.
template <class T, class Vector, class Element>
__device__ inline void for_elements(const T* origin, int count, bool dense, Vector vector, Element element) {
  if (!dense) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) element(i);
    return;
  }
  constexpr int kBytes = 16;
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(origin) % kBytes / sizeof(T));
  const int head = min(count, (kVector<T> - past) % kVector<T>);
  const int vectors = (count - head) / kVector<T>;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) vector(head + i * kVector<T>);
  const int rest = count - vectors * kVector<T>;  // head and tail
  for (int i = threadIdx.x; i < rest; i += blockDim.x) element(i < head ? i : i + vectors * kVector<T>);
}

// Where the rows of a block lie in shared memory.
template <class T>
__device__ inline T* staged(const T* origin) {
  return reinterpret_cast<T*>(shared_memory + reinterpret_cast<uintptr_t>(origin) % 16);
}

__device__ inline bool is_dense(const PoolMap& map, int width) { return map.column == 1 && map.row == width; }

// strips = sums of the column bins of every row piece. Shared memory: the rows; width sums, and a sum per column
// segment, for every row segment of the block.
template <class T>
__global__ void __launch_bounds__(kThreads) pool_planes_kernel(const __grid_constant__ PoolArgs args) {
  const PlanesBlock block(args);
  const PoolAxis &rows = args.plan.rows, &columns = args.plan.columns;
  const PoolMap& map = args.map;
  const int width = columns.length, segments = block.rows.last - block.rows.first;
  Sum<T>* sums = reinterpret_cast<Sum<T>*>(shared_memory + args.sums_offset);
  Sum<T>* cells = reinterpret_cast<Sum<T>*>(shared_memory + args.cells_offset);

  const T* origin = block.origin<const T>(map);
  T* pixels = const_cast<T*>(staged(origin));
  for_elements(
      origin, (block.rows.bottom - block.rows.top) * width, is_dense(map, width),
      [&](int i) { __pipeline_memcpy_async(pixels + i, origin + i, 16); },
      [&](int i) { pixels[i] = __ldcs(origin + i / width * map.row + i % width * map.column); });
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();

  const int groups = blockDim.x / args.lanes;
  for (int s = threadIdx.x / args.lanes; s < segments; s += groups) {
    const int top = block.rows.begin(rows, block.rows.first + s) - block.rows.top;
    const int bottom = block.rows.end(rows, block.rows.first + s) - block.rows.top;
    for (int x = threadIdx.x % args.lanes; x < width; x += args.lanes) {
      Sum<T> total = 0;
#pragma unroll 4
      for (int y = top; y < bottom; ++y) total += widen(pixels[y * width + x]);
      sums[s * width + x] = total;
    }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < segments * columns.segments; item += blockDim.x) {
    const int s = item / columns.segments, column = item % columns.segments;
    Sum<T> total = 0;
    for (int x = columns.cut[column]; x < columns.cut[column + 1]; ++x) total += sums[s * width + x];
    cells[item] = total;
  }
  __syncthreads();
  Sum<T>* strips =
      static_cast<Sum<T>*>(args.strips.data) + block.image * args.strips.batch + block.channel * args.strips.channel;
  const bool clears = block.rows.leaves_slot_empty(rows);
  // Lanes are row segments, as bins of one level take equally long.
  for (int item = threadIdx.x; item < segments * columns.bins; item += blockDim.x) {
    const int bin = item / segments, s = item % segments;
    Sum<T> total = 0;
    for (int i = columns.first[bin]; i < columns.last[bin]; ++i) total += cells[s * columns.segments + i];
    Sum<T>* strip = strips + (block.rows.part + block.rows.first + s) * args.strips.slot + bin * args.strips.bin;
    *strip = total;
    if (clears && s == 0) *(strip - args.strips.slot) = 0;
  }
}

// dx = the gradients of the tokens, spread. Shared memory: the rows; a sum per column bin, and one per column segment,
// for every row segment of the block.
template <class T>
__global__ void __launch_bounds__(kThreads) pool_planes_bwd_kernel(const __grid_constant__ PoolArgs args) {
  const PlanesBlock block(args);
  const PoolAxis &rows = args.plan.rows, &columns = args.plan.columns;
  const PoolMap& map = args.map;
  const int width = columns.length, segments = block.rows.last - block.rows.first;
  Sum<T>* sums = reinterpret_cast<Sum<T>*>(shared_memory + args.sums_offset);
  Sum<T>* cells = reinterpret_cast<Sum<T>*>(shared_memory + args.cells_offset);

  const T* tokens =
      static_cast<const T*>(args.tokens.data) + block.image * args.tokens.batch + block.channel * args.tokens.channel;
  for (int item = threadIdx.x; item < segments * columns.bins; item += blockDim.x)
    sums[item] = row_gradient(args, tokens, block.rows.first + item / columns.bins, item % columns.bins);
  __syncthreads();
  for (int item = threadIdx.x; item < segments * columns.segments; item += blockDim.x) {
    const int s = item / columns.segments, column = item % columns.segments;
    Sum<T> total = 0;
    for (int h = columns.holder_start[column]; h < columns.holder_start[column + 1]; ++h)
      total += sums[s * columns.bins + columns.holders[h]];
    cells[item] = total;
  }
  __syncthreads();
  T* origin = block.origin<T>(map);
  T* pixels = staged(origin);
  const int groups = blockDim.x / args.lanes;
  for (int x = threadIdx.x % args.lanes; x < width; x += args.lanes) {
    const int column = columns.segment_at(x);
    for (int s = threadIdx.x / args.lanes; s < segments; s += groups) {
      const int top = block.rows.begin(rows, block.rows.first + s) - block.rows.top;
      const int bottom = block.rows.end(rows, block.rows.first + s) - block.rows.top;
      const T value = narrow<T>(cells[s * columns.segments + column]);
#pragma unroll 4
      for (int y = top; y < bottom; ++y) pixels[y * width + x] = value;
    }
  }
  __syncthreads();
  for_elements(
      origin, (block.rows.bottom - block.rows.top) * width, is_dense(map, width),
      [&](int i) { *reinterpret_cast<uint4*>(origin + i) = *reinterpret_cast<const uint4*>(pixels + i); },
      [&](int i) { origin[i / width * map.row + i % width * map.column] = pixels[i]; });
}

}  // namespace annnet::cuda
