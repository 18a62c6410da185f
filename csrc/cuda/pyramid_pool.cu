// Which kernels serve a pooling, and how its work is cut: everything that depends on layout, alignment and size.
#include <limits.h>

#include "pool_channels.h"
#include "pool_direct.h"
#include "pool_finish.h"
#include "pool_planes.h"
#include "pyramid_pool.h"

namespace annnet::cuda {

namespace {

constexpr int64_t kSharedBytes = 32 << 10;  // a block's limit; seven such blocks fit a multiprocessor of an H100
constexpr int kMostLanes = 32, kFewestLanes = 8;
constexpr int64_t kChannelRows = 16;  // rows of a block, where there are enough blocks
constexpr int64_t kFewestRows = 8;
constexpr int64_t kBlocksPerMultiprocessor = 4;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, int64_t blocks, int threads, int64_t shared_bytes,
                   cudaStream_t stream) {
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// What a call is turned into: the kernel, its arguments and its blocks. `spread` is the backward.
template <class T>
class Pooling {
 public:
  Pooling(const PoolCall& call, bool spread, int64_t multiprocessors)
      : call_(call), spread_(spread), enough_blocks_(kBlocksPerMultiprocessor * multiprocessors) {
    for (int i = 0; i < 4; ++i) strides_[i] = call.map_strides[i];
    if (call.width == 1) strides_[3] = 1;
    if (call.height == 1) strides_[2] = call.width;
    args_.channels = static_cast<int>(call.channels);
  }

  cudaError_t run(Scratch* scratch, cudaStream_t stream) {
    if (!choose()) return run_direct(stream);
    if (spread_) return launch(kernel_, args_, blocks_, threads_, shared_bytes_, stream);
    const int64_t slots = args_.plan.rows.slots(args_.part_rows), bins = args_.plan.columns.bins;
    const int64_t bytes = call_.images * call_.channels * slots * bins * static_cast<int64_t>(sizeof(Sum<T>));
    PoolStrips& strips = args_.strips;
    strips = {scratch->allocate(bytes), call_.channels * slots * bins, slots * bins, 1, slots};
    if (channels_inner_) strips = {strips.data, strips.batch, 1, bins * call_.channels, call_.channels};
    const cudaError_t error = launch(kernel_, args_, blocks_, threads_, shared_bytes_, stream);
    if (error != cudaSuccess) return error;
    const int64_t tiles = call_.images * divide_up(call_.channels, kTile) * divide_up(args_.plan.tokens, kTile);
    return launch(pool_finish_kernel<T>, args_, tiles, kThreads, kTile * (kTile + 1) * sizeof(Sum<T>), stream);
  }

 private:
  // The longest run of neighbours in memory decides. False if no kernel but the direct one serves the call.
  bool choose() {
    if (call_.channels >= INT_MAX) return false;
    const int64_t rows = strides_[3] == 1 ? call_.width : 0;
    const int64_t columns = strides_[2] == 1 ? call_.height : 0;
    const int64_t channels = call_.channels == 1 || strides_[1] == 1 ? call_.channels : 0;
    const bool dense = rows != 0 && strides_[2] == call_.width;
    channels_inner_ = !dense && channels > rows && channels >= columns;
    const bool transposed = !dense && !channels_inner_ && columns > rows;
    args_.map = {call_.map, strides_[0], strides_[1], strides_[2], strides_[3]};
    if (transposed) std::swap(args_.map.row, args_.map.column);
    args_.tokens = {call_.tokens, call_.token_strides[0], call_.token_strides[1], call_.token_strides[2]};
    if (!make_plan(call_.height, call_.width, call_.heights, call_.widths, call_.levels, transposed, args_.plan))
      return false;
    return channels_inner_ ? choose_channels() : choose_planes();
  }

  bool choose_channels() {
    const PoolAxis &rows = args_.plan.rows, &columns = args_.plan.columns;
    const bool vectors = aligned();
    const int vector = vectors ? kVector<T> : 1;
    const int64_t per_pixel = divide_up(call_.channels, vector);
    for (int lanes = kMostLanes;; lanes /= 2) {
      args_.chunks = static_cast<int>(divide_up(per_pixel, lanes));
      args_.lanes = static_cast<int>(divide_up(per_pixel, args_.chunks));
      const int workers = std::min(kThreads / args_.lanes, columns.length);
      args_.part_columns = static_cast<int>(divide_up(columns.length, workers));
      threads_ = args_.lanes * workers;
      const int64_t sums = spread_ ? columns.bins : columns.slots(args_.part_columns);
      shared_bytes_ = sums * args_.lanes * vector * static_cast<int64_t>(sizeof(Sum<T>));
      const int64_t blocks = call_.images * args_.chunks * divide_up(rows.length, kChannelRows);
      if (lanes == 1 || (shared_bytes_ <= kSharedBytes && (blocks >= enough_blocks_ || lanes <= kFewestLanes))) break;
    }
    if (shared_bytes_ > kSharedBytes) return false;
    share_rows(call_.images * args_.chunks, kChannelRows);
    if (spread_) {
      kernel_ = vectors ? pool_channels_bwd_kernel<T, kVector<T>> : pool_channels_bwd_kernel<T, 1>;
    } else {
      kernel_ = vectors ? pool_channels_kernel<T, kVector<T>> : pool_channels_kernel<T, 1>;
    }
    return true;
  }

  bool choose_planes() {
    const PoolAxis &rows = args_.plan.rows, &columns = args_.plan.columns;
    int64_t most = 0;  // rows that fit shared memory
    while (most < rows.length && planes_bytes(most + 1) <= kSharedBytes) ++most;
    if (most == 0) return false;
    args_.lanes = std::min(kThreads, static_cast<int>(divide_up(columns.length, 32)) * 32);
    threads_ = kThreads / args_.lanes * args_.lanes;
    share_rows(call_.images * call_.channels, most);
    shared_bytes_ = planes_bytes(args_.part_rows);
    kernel_ = spread_ ? pool_planes_bwd_kernel<T> : pool_planes_kernel<T>;
    return true;
  }

  // Shared memory of the planes kernels for a part of so many rows; sets its offsets.
  int64_t planes_bytes(int64_t part_rows) {
    const PoolAxis& columns = args_.plan.columns;
    const int64_t segments = std::min<int64_t>(part_rows, args_.plan.rows.segments);
    const int64_t sum = sizeof(Sum<T>);
    const int64_t staged = divide_up(part_rows * columns.length * static_cast<int64_t>(sizeof(T)), 16) * 16 + 16;
    const int64_t cells = staged + segments * (spread_ ? columns.bins : columns.length) * sum;
    args_.sums_offset = static_cast<int>(staged);
    args_.cells_offset = static_cast<int>(cells);
    return cells + segments * columns.segments * sum;
  }

  // Cuts the rows of `columns_of_blocks` maps into parts of at most `most` rows, and into more parts where the blocks
  // would be too few to occupy the GPU.
  void share_rows(int64_t columns_of_blocks, int64_t most) {
    const int64_t height = args_.plan.rows.length;
    int64_t parts = divide_up(height, most);
    const int64_t wanted = divide_up(enough_blocks_, columns_of_blocks);
    parts = std::max(parts, std::min(wanted, height / kFewestRows));
    args_.part_rows = static_cast<int>(divide_up(height, parts));
    args_.parts = static_cast<int>(divide_up(height, args_.part_rows));
    blocks_ = columns_of_blocks * args_.parts;
  }

  // Whether every 16 bytes of the channels of a pixel can be loaded at once.
  bool aligned() const {
    const int64_t sizes[] = {call_.images, call_.channels, call_.height, call_.width};
    bool fits = reinterpret_cast<uintptr_t>(call_.map) % 16 == 0 && call_.channels % kVector<T> == 0;
    for (const int dim : {0, 2, 3}) fits = fits && (sizes[dim] == 1 || strides_[dim] % kVector<T> == 0);
    return fits;
  }

  cudaError_t run_direct(cudaStream_t stream) {
    DirectArgs args = {};
    if (call_.levels > kDirectLevels) return cudaErrorInvalidValue;
    args.map = {call_.map, call_.map_strides[0], call_.map_strides[1], call_.map_strides[2], call_.map_strides[3]};
    args.tokens = {call_.tokens, call_.token_strides[0], call_.token_strides[1], call_.token_strides[2]};
    args.channels = call_.channels;
    args.height = call_.height;
    args.width = call_.width;
    args.levels = call_.levels;
    for (int i = 0; i < call_.levels; ++i)
      args.level[i] = {call_.heights[i], call_.widths[i], level_offset(call_.heights, call_.widths, i)};
    args.n_tokens = level_offset(call_.heights, call_.widths, call_.levels);
    args.count = call_.images * call_.channels * (spread_ ? call_.height * call_.width : args.n_tokens);
    const auto kernel = spread_ ? pool_direct_bwd_kernel<T> : pool_direct_kernel<T>;
    return launch(kernel, args, divide_up(args.count, kThreads), kThreads, 0, stream);
  }

  const PoolCall& call_;
  const bool spread_;
  const int64_t enough_blocks_;
  int64_t strides_[4];
  bool channels_inner_ = false;
  PoolArgs args_ = {};
  void (*kernel_)(PoolArgs) = nullptr;
  int64_t blocks_ = 0, shared_bytes_ = 0;
  int threads_ = 0;
};

cudaError_t pool(const PoolCall& call, bool spread, Scratch* scratch, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  switch (call.dtype) {
    case kFloat32:
      return Pooling<float>(call, spread, multiprocessors).run(scratch, stream);
    case kFloat64:
      return Pooling<double>(call, spread, multiprocessors).run(scratch, stream);
    case kBFloat16:
      return Pooling<__nv_bfloat16>(call, spread, multiprocessors).run(scratch, stream);
    case kFloat16:
      return Pooling<__half>(call, spread, multiprocessors).run(scratch, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t pyramid_pool(const PoolCall& call, Scratch& scratch, cudaStream_t stream) {
  return pool(call, false, &scratch, stream);
}

cudaError_t pyramid_pool_bwd(const PoolCall& call, cudaStream_t stream) { return pool(call, true, nullptr, stream); }

}  // namespace annnet::cuda
