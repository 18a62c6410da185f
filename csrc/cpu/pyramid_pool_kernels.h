// Pooling and its gradient for one instruction level; pyramid_pool.h describes the pieces of work.
#pragma once

#include "memory.h"
#include "norm.h"
#include "pyramid_pool.h"
#include "transpose.h"
#include "vector.h"

namespace annnet::ANNNET_LEVEL {

// Where channels lie apart, a vector of them is worked on together: a channel at a time to and from buffers of this
// many elements per channel, which fit the second-level cache, so that memory is walked in long runs (three rows of
// each channel in turn instead took 2.9 times as long at 97 × 97), and transposed between the buffers and the lanes.
// With a power of two here, all buffers would share a few sets of the first-level cache: the gradient took 0.87 ms, not
// 0.80.
constexpr int64_t kLine = 4096 + 32;

// Calls body(offset) for vectors that cover 0 … count - 1; where they do not divide it, two overlap and do the same
// work twice. The overlapping one comes first: what a later load reads was then written by one store, not two, and need
// not wait for both to leave the store buffer. Only for count ≥ lanes.
template <class T, class Body>
ANNNET_INLINE void for_vectors(int64_t count, Body body) {
  if (count % kLanes<T> != 0) body(count - kLanes<T>);
  for (int64_t offset = 0; offset + kLanes<T> <= count; offset += kLanes<T>) body(offset);
}

// Copies to memory that will not be read soon.
template <class T>
ANNNET_INLINE void write_out(T* target, const T* source, int64_t count) {
  if (count < kLanes<T>) {
    memcpy(target, source, static_cast<size_t>(count) * sizeof(T));
  } else {
    for_vectors<T>(count, [&](int64_t i) {
      prefetch_to_write(target + i);
      memcpy(target + i, source + i, kLanes<T> * sizeof(T));
    });
  }
}

// Adds to memory that will not be read soon, or copies to it.
template <class T>
ANNNET_INLINE void bring_out(bool adds, T* target, const T* source, int64_t count) {
  if (!adds) return write_out(target, source, count);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    prefetch_to_write(target + i);
    store_lanes(target + i, 1, load_lanes(target + i, 1, count - i) + load_lanes(source + i, 1, count - i), count - i);
  }
}

// Copies a line to `rows` rows that follow each other in memory, each at least a vector long. The line begins anew in
// the room for a vector behind it, so that all stores but the outer ones are aligned, whatever the length of a row: 16
// channels of 97 × 97 floats, in the cache, took 8 µs, and row by row 12 µs.
ANNNET_INLINE void write_rows(char* target, char* line, int64_t row_bytes, int64_t rows) {
  const auto copy = [](char* to, const char* from) { memcpy(to, from, kVectorBytes); };
  copy(line + row_bytes, line);
  copy(target, line);
  int64_t start = kVectorBytes - static_cast<int64_t>(reinterpret_cast<uintptr_t>(target) % kVectorBytes);
  for (int64_t row = 0; row < rows; ++row, target += row_bytes, start -= row_bytes) {
    const int64_t end = row + 1 < rows ? row_bytes : row_bytes - kVectorBytes + 1;
    for (; start < end; start += kVectorBytes) {
      prefetch_to_write(target + start);
      copy(target + start, line + start);
    }
  }
  copy(target - kVectorBytes, line + row_bytes - kVectorBytes);
}

// Index of the token of a row bin (counted over all levels) and a column of its level.
ANNNET_INLINE int64_t token_of(const PoolLevel& level, int64_t row_bin, int64_t column) {
  return level.token + (row_bin - level.first_row_bin) * level.row_stride + column * level.column_stride;
}

// ---- forward ----

// bins[k] = Σ of the segments that bin k holds, for `count` channels.
template <class T>
void bins_from_segments(const PoolAxis& axis, int64_t count, const Acc<T>* segments, int64_t segment_stride,
                        Acc<T>* bins, int64_t bin_stride) {
  for (int64_t bin = 0; bin < axis.bins; ++bin) {
    for (int64_t c = 0; c < count; c += kLanes<T>) {
      Vec<T> sum = load(segments + axis.bin_first[bin] * segment_stride + c);
      for (int64_t s = axis.bin_first[bin] + 1; s < axis.bin_last[bin]; ++s)
        sum += load(segments + s * segment_stride + c);
      store(bins + bin * bin_stride + c, sum);
    }
  }
}

// Vectors of columns that are summed together, row by row: with each column vector's rows in a loop of their own, whose
// few rounds are hard to predict, sums of 512 × 97 × 97 floats took 0.90 ms on one thread, and so 0.73 ms.
constexpr int kWide = 8;

// sums[x] = Σ over rows of column x, for kVectors vectors of columns from `left` on. Where the last would end beyond
// `count`, it overlaps the one before, which is stored later: see for_vectors.
template <class T, int kVectors, class Read>
ANNNET_INLINE void sum_vectors(const T* map, int64_t row_stride, int64_t rows, int64_t left, int64_t count,
                               const Read& read, Acc<T>* sums) {
  const int64_t end = left + kVectors * kLanes<T>;
  const int64_t last = (end < count ? end : count) - kLanes<T>;
  const auto column = [&](int vector) { return vector + 1 < kVectors ? left + vector * kLanes<T> : last; };
  Vec<T> sum[kVectors] = {};
  for (int64_t y = 0; y < rows; ++y, map += row_stride) {
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; ++vector) {
      prefetch(map + column(vector));
      sum[vector] += read(load(map + column(vector)));
    }
  }
  store(sums + last, sum[kVectors - 1]);
#pragma GCC unroll 8
  for (int vector = 0; vector + 1 < kVectors; ++vector) store(sums + column(vector), sum[vector]);
}

template <class T, int kMost, class... Arguments>
ANNNET_INLINE void sum_up_to(int64_t vectors, const Arguments&... arguments) {
  if constexpr (kMost > 1) {
    if (vectors < kMost) return sum_up_to<T, kMost - 1>(vectors, arguments...);
  }
  sum_vectors<T, kMost>(arguments...);
}

// sums[x] = Σ over rows of column x, for `count` columns.
template <class T, class Read>
ANNNET_INLINE void sum_over_rows(const T* map, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t count,
                                 const Read& read, Acc<T>* sums) {
  if (column_stride == 1 && count >= kLanes<T>) {
    for (int64_t x = 0; x < count; x += kWide * kLanes<T>) {
      const int64_t vectors = (count - x + kLanes<T> - 1) / kLanes<T>;
      sum_up_to<T, kWide>(vectors < kWide ? vectors : kWide, map, row_stride, rows, x, count, read, sums);
    }
    return;
  }
  for (int64_t x = 0; x < count; x += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t y = 0; y < rows; ++y)
      sum += read(load_lanes(map + y * row_stride + x * column_stride, column_stride, count - x));
    store(sums + x, sum);
  }
}

// How a row of `width` columns is walked: in pieces of at most kLine columns, `batch` row segments at a time. If it is
// `whole`, its line has room for a vector of elements of any type behind it.
struct Walk {
  ANNNET_INLINE explicit Walk(int64_t width)
      : whole(width + 32 <= kLine), stride(whole ? (width + 32 + 15) / 16 * 16 : kLine), batch(kLine / stride) {}
  bool whole;
  int64_t stride, batch;
};

template <class T, template <class> class Read>
void sum_rows(const PoolArgs& args, PoolUnit unit, int64_t first, int64_t last, void* bins, void* scratch) {
  const PoolAxis& columns = args.columns;
  const int64_t width = columns.segment_start[columns.segments];
  const T* map = static_cast<const T*>(args.map.data) + unit.image * args.map.batch + unit.channel * args.map.channel;
  Acc<T>* lines = static_cast<Acc<T>*>(scratch);
  Acc<T>* segments = lines + kLanes<T> * kLine;
  const Walk walk(width);
  for (int64_t group = 0; group < args.block; group += kLanes<T>) {
    const int64_t lanes = unit.count - group < kLanes<T> ? unit.count - group : kLanes<T>;
    for (int64_t s = first; s < last; s += walk.batch) {
      const int64_t end = s + walk.batch < last ? s + walk.batch : last;
      int64_t segment = 0;
      Vec<T> segment_sum = {};
      for (int64_t left = 0; left < width; left += kLine) {
        const int64_t count = width - left < kLine ? width - left : kLine;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const T* channel = map + (group + lane) * args.map.channel + left * args.map.column;
          const auto read = Read<T>::of_channel(args.norm, unit.channel + group + lane);
          for (int64_t row = s; row < end; ++row) {
            const int64_t top = args.rows.segment_start[row], bottom = args.rows.segment_start[row + 1];
            sum_over_rows(channel + top * args.map.row, args.map.row, args.map.column, bottom - top, count, read,
                          lines + lane * kLine + (row - s) * walk.stride);
          }
        }
        for (int64_t row = s; row < end; ++row) {
          for (int64_t x = 0; x < count; x += kLanes<T>) {
            Vec<T> square[kLanes<T>];
            for (int64_t lane = 0; lane < kLanes<T>; ++lane)
              square[lane] = lane < lanes ? load(lines + lane * kLine + (row - s) * walk.stride + x) : Vec<T>{};
            transpose(square);
            for (int64_t i = 0; i < kLanes<T> && x + i < count; ++i) {
              segment_sum += square[i];
              if (left + x + i + 1 == columns.segment_start[segment + 1]) {
                store(segments + segment * kLanes<T>, segment_sum);
                segment_sum = Vec<T>{};
                ++segment;
              }
            }
          }
          if (segment == columns.segments) {
            Acc<T>* target = static_cast<Acc<T>*>(bins) + (row - first) * columns.bins * args.block + group;
            bins_from_segments<T>(columns, kLanes<T>, segments, kLanes<T>, target, args.block);
            segment = 0;
          }
        }
      }
    }
  }
}

// Channels of one pixel lie together: the lanes. The map is read in the order of memory, a pixel at a time, and added
// to the sums of its segment, which stay in the first-level cache: 512 × 97 × 97 in float32, one thread, from memory,
// took 0.48 ms, as long as reading alone; a vector of channels of three neighbours at a time 0.79 ms, and of nine 1.12
// ms.
template <class T, template <class> class Read>
void sum_channels(const PoolArgs& args, PoolUnit unit, int64_t first, int64_t last, void* bins, void* scratch) {
  const PoolAxis& columns = args.columns;
  const T* map = static_cast<const T*>(args.map.data) + unit.image * args.map.batch + unit.channel;
  Acc<T>* segments = static_cast<Acc<T>*>(scratch);
  for (int64_t row = first; row < last; ++row) {
    memset(segments, 0, static_cast<size_t>(columns.segments * args.block) * sizeof(Acc<T>));
    for (int64_t y = args.rows.segment_start[row]; y < args.rows.segment_start[row + 1]; ++y) {
      const T* pixel = map + y * args.map.row;
      for (int64_t s = 0; s < columns.segments; ++s) {
        Acc<T>* sums = segments + s * args.block;
        for (int64_t x = columns.segment_start[s]; x < columns.segment_start[s + 1]; ++x, pixel += args.map.column) {
          const auto add = [&](int64_t c, int64_t count) {
            const auto read = Read<T>::of_channels(args.norm, unit.channel + c, count);
            prefetch(pixel + c);
            store(sums + c, load(sums + c) + read(load_lanes(pixel + c, 1, count)));
          };
          int64_t c = 0;
          for (; c + kLanes<T> <= unit.count; c += kLanes<T>) add(c, kLanes<T>);
          if (c < unit.count) add(c, unit.count - c);
        }
      }
    }
    bins_from_segments<T>(columns, args.block, segments, args.block,
                          static_cast<Acc<T>*>(bins) + (row - first) * columns.bins * args.block, args.block);
  }
}

template <class T>
void finish(const PoolArgs& args, PoolUnit unit, int64_t first_row_bin, int64_t last_row_bin, const void* bins) {
  T* tokens = static_cast<T*>(args.tokens.data) + unit.image * args.tokens.batch + unit.channel * args.tokens.channel;
  const int64_t per_segment = args.columns.bins * args.block;
  for (int64_t row_bin = first_row_bin; row_bin < last_row_bin; ++row_bin) {
    const PoolLevel& level = args.levels[args.row_bin_level[row_bin]];
    const Acc<T>* first = static_cast<const Acc<T>*>(bins) + args.rows.bin_first[row_bin] * per_segment;
    const int64_t segments = args.rows.bin_last[row_bin] - args.rows.bin_first[row_bin];
    for (int64_t column = 0; column < level.columns; ++column) {
      const int64_t column_bin = level.first_column_bin + column;
      T* token = tokens + args.tokens.token * token_of(level, row_bin, column);
      const Vec<T> area = broadcast<T>(static_cast<Acc<T>>(args.rows.bin_length[row_bin]) *
                                       static_cast<Acc<T>>(args.columns.bin_length[column_bin]));
      for (int64_t c = 0; c < unit.count; c += kLanes<T>) {
        const Acc<T>* source = first + column_bin * args.block + c;
        Vec<T> sum = load(source);
        for (int64_t s = 1; s < segments; ++s) sum += load(source + s * per_segment);
        store_lanes(token + c * args.tokens.channel, args.tokens.channel, sum / area, unit.count - c);
      }
    }
  }
}

// ---- backward ----

// cells[s] = gradient of the pixels in column segment s of a row segment, `block` channels each; `column_bins` is
// workspace of as many channels per column bin.
template <class T>
void cells_of_row_segment(const PoolArgs& args, PoolUnit unit, int64_t block, int64_t row_segment, Acc<T>* column_bins,
                          Acc<T>* cells) {
  const PoolAxis& rows = args.rows;
  const PoolAxis& columns = args.columns;
  const T* tokens =
      static_cast<const T*>(args.tokens.data) + unit.image * args.tokens.batch + unit.channel * args.tokens.channel;
  memset(column_bins, 0, static_cast<size_t>(columns.bins * block) * sizeof(Acc<T>));
  for (int64_t holder = rows.holder_start[row_segment]; holder < rows.holder_start[row_segment + 1]; ++holder) {
    const int64_t row_bin = rows.holders[holder];
    const PoolLevel& level = args.levels[args.row_bin_level[row_bin]];
    for (int64_t column = 0; column < level.columns; ++column) {
      const int64_t column_bin = level.first_column_bin + column;
      const T* token = tokens + args.tokens.token * token_of(level, row_bin, column);
      const Vec<T> share = broadcast<T>(
          1 / (static_cast<Acc<T>>(rows.bin_length[row_bin]) * static_cast<Acc<T>>(columns.bin_length[column_bin])));
      for (int64_t c = 0; c < unit.count; c += kLanes<T>) {
        Acc<T>* sum = column_bins + column_bin * block + c;
        store(sum,
              load(sum) + load_lanes(token + c * args.tokens.channel, args.tokens.channel, unit.count - c) * share);
      }
    }
  }
  for (int64_t s = 0; s < columns.segments; ++s) {
    for (int64_t c = 0; c < block; c += kLanes<T>) {
      Vec<T> sum = {};
      for (int64_t holder = columns.holder_start[s]; holder < columns.holder_start[s + 1]; ++holder)
        sum += load(column_bins + columns.holders[holder] * block + c);
      store(cells + s * block + c, sum);
    }
  }
}

// Channels first … first + count - 1 of a unit, as many as there are.
ANNNET_INLINE PoolUnit part_of(PoolUnit unit, int64_t first, int64_t count) {
  return {unit.image, unit.channel + first, unit.count - first < count ? unit.count - first : count};
}

// The gradient of a row segment in columns left … left + count - 1, a line per channel of a unit of up to kLanes: all
// rows of the segment are this. The cells are made with the first piece (left 0), kept in `workspace`, and transposed.
template <class T, class Line>
ANNNET_INLINE void lines_of_row_segment(const PoolArgs& args, PoolUnit unit, int64_t row_segment, int64_t left,
                                        int64_t count, Acc<T>* workspace, Line* lines) {
  const PoolAxis& columns = args.columns;
  Acc<T>* cells = workspace;
  if (left == 0)
    cells_of_row_segment<T>(args, unit, kLanes<T>, row_segment, cells + columns.segments * kLanes<T>, cells);
  for (int64_t x = 0; x < count; x += kLanes<T>) {
    Vec<T> square[kLanes<T>];
    for (int64_t i = 0; i < kLanes<T>; ++i) square[i] = load(cells + columns.segment_of[left + x + i] * kLanes<T>);
    transpose(square);
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) store(lines + lane * kLine + x, square[lane]);
  }
}

template <class T>
void spread_rows(const PoolArgs& args, PoolUnit unit, int64_t first, int64_t last, void* scratch) {
  const int64_t width = args.columns.segment_start[args.columns.segments];
  T* map = static_cast<T*>(args.map.data) + unit.image * args.map.batch;
  T* lines = static_cast<T*>(scratch);
  Acc<T>* workspace = reinterpret_cast<Acc<T>*>(lines + kLanes<T> * kLine);
  const Walk walk(width);
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  const bool dense = !args.adds && walk.whole && args.map.row == width && row_bytes >= kVectorBytes;
  for (int64_t group = 0; group < unit.count; group += kLanes<T>) {
    const PoolUnit part = part_of(unit, group, kLanes<T>);
    for (int64_t s = first; s < last; s += walk.batch) {
      const int64_t end = s + walk.batch < last ? s + walk.batch : last;
      for (int64_t left = 0; left < width; left += kLine) {
        const int64_t count = width - left < kLine ? width - left : kLine;
        for (int64_t row = s; row < end; ++row)
          lines_of_row_segment<T>(args, part, row, left, count, workspace, lines + (row - s) * walk.stride);
        for (int64_t lane = 0; lane < part.count; ++lane) {
          for (int64_t row = s; row < end; ++row) {
            T* line = lines + lane * kLine + (row - s) * walk.stride;
            T* channel = map + (part.channel + lane) * args.map.channel + left;
            const int64_t top = args.rows.segment_start[row], bottom = args.rows.segment_start[row + 1];
            if (dense) {
              write_rows(reinterpret_cast<char*>(channel + top * width), reinterpret_cast<char*>(line), row_bytes,
                         bottom - top);
            } else {
              for (int64_t y = top; y < bottom; ++y) bring_out(args.adds, channel + y * args.map.row, line, count);
            }
          }
        }
      }
    }
  }
}

template <class T>
void spread_channels(const PoolArgs& args, PoolUnit unit, int64_t first, int64_t last, void* scratch) {
  const PoolAxis& columns = args.columns;
  Acc<T>* cells = static_cast<Acc<T>*>(scratch);
  Acc<T>* column_bins = cells + columns.segments * args.block;
  T* pixel = reinterpret_cast<T*>(column_bins);  // the cell rounded, where the bins are no longer needed
  T* map = static_cast<T*>(args.map.data) + unit.image * args.map.batch + unit.channel;
  for (int64_t row = first; row < last; ++row) {
    cells_of_row_segment<T>(args, unit, args.block, row, column_bins, cells);
    for (int64_t s = 0; s < columns.segments; ++s) {
      for (int64_t c = 0; c < args.block; c += kLanes<T>) store(pixel + c, load(cells + s * args.block + c));
      for (int64_t y = args.rows.segment_start[row]; y < args.rows.segment_start[row + 1]; ++y)
        for (int64_t x = columns.segment_start[s]; x < columns.segment_start[s + 1]; ++x)
          bring_out(args.adds, map + y * args.map.row + x * args.map.column, pixel, unit.count);
    }
  }
}

#define ANNNET_PER_DTYPE(kernel) {kernel<float>, kernel<double>, kernel<BFloat16>, kernel<Float16>}
#define ANNNET_PER_DTYPE_READING(kernel, Read) \
  {kernel<float, Read>, kernel<double, Read>, kernel<BFloat16, Read>, kernel<Float16, Read>}

constexpr PyramidPoolKernels pyramid_pool_kernels = {
    .sum_rows = ANNNET_PER_DTYPE_READING(sum_rows, Plain),
    .sum_channels = ANNNET_PER_DTYPE_READING(sum_channels, Plain),
    .sum_rows_bn_relu = ANNNET_PER_DTYPE_READING(sum_rows, BnRelu),
    .sum_channels_bn_relu = ANNNET_PER_DTYPE_READING(sum_channels, BnRelu),
    .finish = ANNNET_PER_DTYPE(finish),
    .spread_rows = ANNNET_PER_DTYPE(spread_rows),
    .spread_channels = ANNNET_PER_DTYPE(spread_channels),
    .scratch_bytes = kVectorBytes * kLine,
};

}  // namespace annnet::ANNNET_LEVEL
