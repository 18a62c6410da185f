// Arguments of the pooling kernels. Strides are in elements.
#pragma once

#include "elements.h"
#include "pool_plan.h"

namespace annnet::cuda {

// Dynamic shared memory of a block.
extern __shared__ __align__(16) unsigned char shared_memory[];

constexpr int kThreads = 256;

struct PoolMap {
  void* data;
  int64_t batch, channel, row, column;
};

struct PoolTokens {
  void* data;
  int64_t batch, channel, token;
};

// Sums of the column bins of all row pieces, what the forward leaves to its second kernel.
struct PoolStrips {
  void* data;
  int64_t batch, channel, slot, bin;
};

struct PoolArgs {
  PoolPlan plan;
  PoolMap map;
  PoolTokens tokens;
  PoolStrips strips;
  int channels;
  int part_rows, parts;  // rows of a block
  int lanes;             // threads side by side: over vectors of channels, or over columns
  // Channels side by side in memory only:
  int chunks;        // blocks that share the channels of a pixel
  int part_columns;  // columns of a thread
  // Planes only: byte offsets into shared memory.
  int sums_offset, cells_offset;
};
static_assert(sizeof(PoolArgs) < 4096);

// The rows of a block and the row segments that they touch: first … last - 1.
struct PoolRows {
  int part, top, bottom, first, last;

  __device__ PoolRows(const PoolArgs& args, int part)
      : part(part),
        top(part * args.part_rows),
        bottom(min(top + args.part_rows, args.plan.rows.length)),
        first(args.plan.rows.segment_at(top)),
        last(args.plan.rows.segment_at(bottom - 1) + 1) {}

  __device__ int begin(const PoolAxis& rows, int segment) const { return max(rows.cut[segment], top); }
  __device__ int end(const PoolAxis& rows, int segment) const { return min(rows.cut[segment + 1], bottom); }
  __device__ bool leaves_slot_empty(const PoolAxis& rows) const { return part > 0 && rows.cut[first] == top; }
};

// The bins of token `index` in the order of the plan, and its place among the tokens of the user.
struct PoolToken {
  int row_bin, column_bin, place;

  __device__ PoolToken(const PoolPlan& plan, int index) {
    int l = 0;
    while (l + 1 < plan.levels && plan.level[l + 1].token <= index) ++l;
    const PoolLevel& level = plan.level[l];
    const int i = (index - level.token) / level.columns, j = (index - level.token) % level.columns;
    row_bin = level.first_row_bin + i;
    column_bin = level.first_column_bin + j;
    place = level.token + i * level.row_stride + j * level.column_stride;
  }
};

// The gradient that row bins of a segment hand to column bin `bin`: their tokens' gradients, each over its area.
// `grad` is that of one image and channel.
template <class T>
__device__ Sum<T> row_gradient(const PoolArgs& args, const T* grad, int segment, int bin) {
  const PoolPlan& plan = args.plan;
  const PoolLevel& level = plan.level[plan.columns.level[bin]];
  const int j = bin - level.first_column_bin;
  Sum<T> total = 0;
  for (int h = plan.rows.holder_start[segment]; h < plan.rows.holder_start[segment + 1]; ++h) {
    const int i = plan.rows.holders[h] - level.first_row_bin;
    if (i < 0 || i >= level.rows) continue;
    const int64_t token = level.token + i * level.row_stride + j * level.column_stride;
    const Sum<T> area = Sum<T>(plan.rows.bin_length(plan.rows.holders[h])) * Sum<T>(plan.columns.bin_length(bin));
    total += widen(grad[token * args.tokens.token]) / area;
  }
  return total;
}

}  // namespace annnet::cuda
