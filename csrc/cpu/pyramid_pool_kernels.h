// Pooling and its gradient for one instruction level; pyramid_pool.h describes the pieces of work.
#pragma once

#include "pyramid_pool.h"
#include "transpose.h"
#include "vector.h"

namespace annnet::ANNNET_LEVEL {

// Columns that a unit holds transposed at a time: 16 channels × 128 columns are 8 KiB of cache.
constexpr int64_t kColumns = 128;

template <class T>
ANNNET_INLINE Vec<T> load_strided(const T* source, int64_t stride, int64_t count) {
  T elements[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) elements[i] = source[i * stride];
  return load(elements);
}

template <class T>
ANNNET_INLINE void store_strided(T* target, int64_t stride, Vec<T> value, int64_t count) {
  T elements[kLanes<T>];
  store(elements, value);
  for (int64_t i = 0; i < count; ++i) target[i * stride] = elements[i];
}

// Up to a vector of channels, from wherever they lie. `count` may exceed the lanes.
template <class T>
ANNNET_INLINE Vec<T> load_channels(const T* source, int64_t stride, int64_t count) {
  if (stride == 1 && count >= kLanes<T>) return load(source);
  return load_strided(source, stride, count < kLanes<T> ? count : kLanes<T>);
}

template <class T>
ANNNET_INLINE void store_channels(T* target, int64_t stride, Vec<T> value, int64_t count) {
  if (stride == 1 && count >= kLanes<T>) return store(target, value);
  store_strided(target, stride, value, count < kLanes<T> ? count : kLanes<T>);
}

// Calls body(offset) for vectors that cover 0 … count - 1; where they do not divide it, the last two overlap and do
// the same work twice. Only for count ≥ lanes.
template <class T, class Body>
ANNNET_INLINE void for_vectors(int64_t count, Body body) {
  int64_t offset = 0;
  for (; offset + kLanes<T> <= count; offset += kLanes<T>) body(offset);
  if (offset < count) body(count - kLanes<T>);
}

// ---- forward ----

// bins[k] = Σ of the segments that bin k holds, both arrays of `block` channels.
template <class T>
void bins_from_segments(const PoolAxis& axis, int64_t block, const Acc<T>* segments, Acc<T>* bins) {
  for (int64_t bin = 0; bin < axis.bins; ++bin) {
    for (int64_t offset = 0; offset < block; offset += kLanes<T>) {
      Vec<T> sum = load(segments + axis.bin_first[bin] * block + offset);
      for (int64_t s = axis.bin_first[bin] + 1; s < axis.bin_last[bin]; ++s) sum += load(segments + s * block + offset);
      store(bins + bin * block + offset, sum);
    }
  }
}

// sums[x] = Σ over rows of column x, for `count` columns.
template <class T>
ANNNET_INLINE void sum_over_rows(const T* map, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t count,
                                 Acc<T>* sums) {
  if (column_stride == 1 && count >= kLanes<T>) {
    for_vectors<T>(count, [&](int64_t x) {
      Vec<T> sum = load(map + x);
      for (int64_t y = 1; y < rows; ++y) sum += load(map + y * row_stride + x);
      store(sums + x, sum);
    });
    return;
  }
  for (int64_t x = 0; x < count; x += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t y = 0; y < rows; ++y)
      sum += load_channels(map + y * row_stride + x * column_stride, column_stride, count - x);
    store(sums + x, sum);
  }
}

// Rows of one channel lie together: their sum is made along the row, then `lanes` channels are transposed, so that
// the ragged column segments are sums of whole vectors.
template <class T>
void sum_rows(const PoolArgs& args, PoolUnit unit, int64_t row_segment, void* bins, void* scratch) {
  const int64_t top = args.rows.segment_start[row_segment];
  const int64_t rows = args.rows.segment_start[row_segment + 1] - top;
  const int64_t width = args.columns.segment_start[args.columns.segments];
  const T* map = static_cast<const T*>(args.map.data) + unit.image * args.map.batch + top * args.map.row;
  Acc<T>* segments = static_cast<Acc<T>*>(scratch);
  for (int64_t group = 0; group < args.block; group += kLanes<T>) {
    Acc<T> sums[kLanes<T>][kColumns];
    Vec<T> segment_sum = {};
    int64_t segment = 0;
    for (int64_t left = 0; left < width; left += kColumns) {
      const int64_t count = width - left < kColumns ? width - left : kColumns;
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        if (group + lane < unit.count) {
          const T* source = map + (unit.channel + group + lane) * args.map.channel + left * args.map.column;
          sum_over_rows(source, args.map.row, args.map.column, rows, count, sums[lane]);
        } else {
          memset(sums[lane], 0, sizeof sums[lane]);
        }
      }
      for (int64_t x = 0; x < count; x += kLanes<T>) {
        Vec<T> square[kLanes<T>];
        for (int lane = 0; lane < kLanes<T>; ++lane) square[lane] = load(&sums[lane][x]);
        transpose(square);
        for (int64_t i = 0; i < kLanes<T> && x + i < count; ++i) {
          segment_sum += square[i];
          if (left + x + i + 1 == args.columns.segment_start[segment + 1]) {
            store(segments + segment * args.block + group, segment_sum);
            segment_sum = Vec<T>{};
            ++segment;
          }
        }
      }
    }
  }
  bins_from_segments<T>(args.columns, args.block, segments, static_cast<Acc<T>*>(bins));
}

// Channels of one pixel lie together. The map is read in the order of memory, the sums of one segment stay in cache.
template <class T>
void sum_channels(const PoolArgs& args, PoolUnit unit, int64_t row_segment, void* bins, void* scratch) {
  const int64_t top = args.rows.segment_start[row_segment], bottom = args.rows.segment_start[row_segment + 1];
  const T* map = static_cast<const T*>(args.map.data) + unit.image * args.map.batch + unit.channel;
  Acc<T>* segments = static_cast<Acc<T>*>(scratch);
  for (int64_t s = 0; s < args.columns.segments; ++s) {
    Acc<T>* sums = segments + s * args.block;
    memset(sums, 0, static_cast<size_t>(args.block) * sizeof(Acc<T>));
    for (int64_t y = top; y < bottom; ++y) {
      for (int64_t x = args.columns.segment_start[s]; x < args.columns.segment_start[s + 1]; ++x) {
        const T* pixel = map + y * args.map.row + x * args.map.column;
        int64_t c = 0;
        for (; c + kLanes<T> <= unit.count; c += kLanes<T>) store(sums + c, load(sums + c) + load(pixel + c));
        if (c < unit.count) store(sums + c, load(sums + c) + load_first(pixel + c, unit.count - c));
      }
    }
  }
  bins_from_segments<T>(args.columns, args.block, segments, static_cast<Acc<T>*>(bins));
}

template <class T>
void finish(const PoolArgs& args, PoolUnit unit, const void* bins) {
  T* tokens = static_cast<T*>(args.tokens.data) + unit.image * args.tokens.batch + unit.channel * args.tokens.channel;
  const int64_t per_segment = args.columns.bins * args.block;
  for (int64_t row_bin = 0; row_bin < args.rows.bins; ++row_bin) {
    const PoolLevel& level = args.levels[args.row_bin_level[row_bin]];
    const Acc<T>* first = static_cast<const Acc<T>*>(bins) + args.rows.bin_first[row_bin] * per_segment;
    const int64_t segments = args.rows.bin_last[row_bin] - args.rows.bin_first[row_bin];
    for (int64_t column = 0; column < level.columns; ++column) {
      const int64_t column_bin = level.first_column_bin + column;
      const int64_t token =
          level.token + (row_bin - level.first_row_bin) * level.row_stride + column * level.column_stride;
      const Vec<T> area = broadcast<T>(static_cast<Acc<T>>(args.rows.bin_length[row_bin]) *
                                       static_cast<Acc<T>>(args.columns.bin_length[column_bin]));
      for (int64_t c = 0; c < unit.count; c += kLanes<T>) {
        const Acc<T>* source = first + column_bin * args.block + c;
        Vec<T> sum = load(source);
        for (int64_t s = 1; s < segments; ++s) sum += load(source + s * per_segment);
        store_channels(tokens + token * args.tokens.token + c * args.tokens.channel, args.tokens.channel, sum / area,
                       unit.count - c);
      }
    }
  }
}

// ---- backward ----

// cells[s] = gradient of the pixels in column segment s of a row segment, `block` channels each.
template <class T>
void cells_of_row_segment(const PoolArgs& args, PoolUnit unit, int64_t row_segment, Acc<T>* column_bins,
                          Acc<T>* cells) {
  const PoolAxis& rows = args.rows;
  const PoolAxis& columns = args.columns;
  const T* tokens =
      static_cast<const T*>(args.tokens.data) + unit.image * args.tokens.batch + unit.channel * args.tokens.channel;
  memset(column_bins, 0, static_cast<size_t>(columns.bins * args.block) * sizeof(Acc<T>));
  for (int64_t holder = rows.holder_start[row_segment]; holder < rows.holder_start[row_segment + 1]; ++holder) {
    const int64_t row_bin = rows.holders[holder];
    const PoolLevel& level = args.levels[args.row_bin_level[row_bin]];
    for (int64_t column = 0; column < level.columns; ++column) {
      const int64_t column_bin = level.first_column_bin + column;
      const int64_t token =
          level.token + (row_bin - level.first_row_bin) * level.row_stride + column * level.column_stride;
      const Vec<T> share = broadcast<T>(
          1 / (static_cast<Acc<T>>(rows.bin_length[row_bin]) * static_cast<Acc<T>>(columns.bin_length[column_bin])));
      for (int64_t c = 0; c < unit.count; c += kLanes<T>) {
        const Vec<T> gradient = load_channels(tokens + token * args.tokens.token + c * args.tokens.channel,
                                              args.tokens.channel, unit.count - c);
        Acc<T>* sum = column_bins + column_bin * args.block + c;
        store(sum, load(sum) + gradient * share);
      }
    }
  }
  for (int64_t s = 0; s < columns.segments; ++s) {
    for (int64_t c = 0; c < args.block; c += kLanes<T>) {
      Vec<T> sum = {};
      for (int64_t holder = columns.holder_start[s]; holder < columns.holder_start[s + 1]; ++holder)
        sum += load(column_bins + columns.holders[holder] * args.block + c);
      store(cells + s * args.block + c, sum);
    }
  }
}

// Every row of the segment is the same, so one is made (transposed from the cells) and written out several times.
template <class T>
void spread_rows(const PoolArgs& args, PoolUnit unit, int64_t row_segment, void* scratch) {
  Acc<T>* column_bins = static_cast<Acc<T>*>(scratch);
  Acc<T>* cells = column_bins + args.columns.bins * args.block;
  cells_of_row_segment<T>(args, unit, row_segment, column_bins, cells);
  const int64_t top = args.rows.segment_start[row_segment], bottom = args.rows.segment_start[row_segment + 1];
  const int64_t width = args.columns.segment_start[args.columns.segments];
  T* map = static_cast<T*>(args.map.data) + unit.image * args.map.batch;
  for (int64_t group = 0; group < unit.count; group += kLanes<T>) {
    T line[kLanes<T>][kColumns];
    int64_t segment = 0;
    for (int64_t left = 0; left < width; left += kColumns) {
      const int64_t count = width - left < kColumns ? width - left : kColumns;
      for (int64_t x = 0; x < count; x += kLanes<T>) {
        Vec<T> square[kLanes<T>];
        for (int i = 0; i < kLanes<T>; ++i) {
          square[i] = load(cells + segment * args.block + group);
          segment += left + x + i + 1 == args.columns.segment_start[segment + 1] && segment + 1 < args.columns.segments;
        }
        transpose(square);
        for (int lane = 0; lane < kLanes<T>; ++lane) store(&line[lane][x], square[lane]);
      }
      for (int64_t lane = 0; lane < kLanes<T> && group + lane < unit.count; ++lane) {
        for (int64_t y = top; y < bottom; ++y) {
          T* target = map + (unit.channel + group + lane) * args.map.channel + y * args.map.row + left;
          memcpy(target, line[lane], static_cast<size_t>(count) * sizeof(T));
        }
      }
    }
  }
}

template <class T>
void spread_channels(const PoolArgs& args, PoolUnit unit, int64_t row_segment, void* scratch) {
  Acc<T>* column_bins = static_cast<Acc<T>*>(scratch);
  Acc<T>* cells = column_bins + args.columns.bins * args.block;
  cells_of_row_segment<T>(args, unit, row_segment, column_bins, cells);
  T* elements = reinterpret_cast<T*>(column_bins);  // one cell rounded, in the scratch that is no longer needed
  T* map = static_cast<T*>(args.map.data) + unit.image * args.map.batch + unit.channel;
  for (int64_t s = 0; s < args.columns.segments; ++s) {
    for (int64_t c = 0; c < args.block; c += kLanes<T>) store(elements + c, load(cells + s * args.block + c));
    for (int64_t y = args.rows.segment_start[row_segment]; y < args.rows.segment_start[row_segment + 1]; ++y)
      for (int64_t x = args.columns.segment_start[s]; x < args.columns.segment_start[s + 1]; ++x)
        memcpy(map + y * args.map.row + x * args.map.column, elements, static_cast<size_t>(unit.count) * sizeof(T));
  }
}

#define ANNNET_PER_DTYPE(kernel) {kernel<float>, kernel<double>, kernel<BFloat16>, kernel<Float16>}

constexpr PyramidPoolKernels pyramid_pool_kernels = {
    .sum_rows = ANNNET_PER_DTYPE(sum_rows),
    .sum_channels = ANNNET_PER_DTYPE(sum_channels),
    .finish = ANNNET_PER_DTYPE(finish),
    .spread_rows = ANNNET_PER_DTYPE(spread_rows),
    .spread_channels = ANNNET_PER_DTYPE(spread_channels),
};

}  // namespace annnet::ANNNET_LEVEL
