// The gradient of a normalised, rectified map for one instruction level:
//
//     g = [z lets pass] · (grad_map + P · grad_tokens)    dy = weight · invstd · (g − mean g − ŷ · mean(g·ŷ))
#pragma once

#include "bn_relu_pool.h"
#include "pyramid_pool_kernels.h"

namespace annnet::ANNNET_LEVEL {

// What is done with a vector of y and of the gradient of z: Σ g and Σ g·ŷ …
template <class T>
struct BnReluSums {
  BnRelu<T> norm;
  Vec<T> sum_g = {}, sum_gy = {};

  ANNNET_INLINE void add(Vec<T> y, Vec<T> grad) {
    const Vec<T> g = norm.gradient(y, grad);
    sum_g += g;
    sum_gy += g * norm.normal(y);
  }
};

// … or dy.
template <class T>
struct BnReluInput {
  BnRelu<T> norm;
  Vec<T> mean_g, mean_gy;

  ANNNET_INLINE static BnReluInput of_channel(const BnReluArgs& args, int64_t channel) {
    const Acc<T>* means = static_cast<const Acc<T>*>(args.mean_sums);
    return {BnRelu<T>::of_channel(args.pool.norm, channel), broadcast<T>(means ? means[channel] : 0),
            broadcast<T>(means ? means[args.pool.channels + channel] : 0)};
  }

  ANNNET_INLINE static BnReluInput of_channels(const BnReluArgs& args, int64_t channel, int64_t count) {
    BnReluInput input = {BnRelu<T>::of_channels(args.pool.norm, channel, count), Vec<T>{}, Vec<T>{}};
    if (args.mean_sums != nullptr) {
      const Acc<T>* means = static_cast<const Acc<T>*>(args.mean_sums) + channel;
      input.mean_g = load_lanes(means, 1, count);
      input.mean_gy = load_lanes(means + args.pool.channels, 1, count);
    }
    return input;
  }

  ANNNET_INLINE Vec<T> operator()(Vec<T> y, Vec<T> grad, bool frozen) const {
    const Vec<T> g = norm.gradient(y, grad);
    const Vec<T> centred = frozen ? g : g - mean_g - norm.normal(y) * mean_gy;
    return centred * (norm.weight * norm.invstd);
  }
};

template <class T>
ANNNET_INLINE const T* at(const PoolMap& map, int64_t image, int64_t channel, int64_t row, int64_t column) {
  return static_cast<const T*>(map.data) + image * map.batch + channel * map.channel + row * map.row +
         column * map.column;
}

template <class T>
ANNNET_INLINE T* writable_at(const PoolMap& map, int64_t image, int64_t channel, int64_t row, int64_t column) {
  return const_cast<T*>(at<T>(map, image, channel, row, column));
}

// Calls visit(lane, row segment, row, column, count, line) for every row of the row segments of a unit in pieces of
// at most kLine columns, channel by channel; `line` is the gradient that comes from the tokens, null if there is none.
template <class T, class Visit>
ANNNET_INLINE void visit_rows(const BnReluArgs& args, PoolUnit unit, int64_t first, int64_t last, void* scratch,
                              const Visit& visit) {
  const PoolAxis& rows = args.pool.rows;
  const PoolAxis& columns = args.pool.columns;
  const int64_t width = columns.segment_start[columns.segments];
  Acc<T>* lines = static_cast<Acc<T>*>(scratch);
  const Walk walk(width);
  for (int64_t group = 0; group < unit.count; group += kLanes<T>) {
    const PoolUnit part = part_of(unit, group, kLanes<T>);
    for (int64_t s = first; s < last; s += walk.batch) {
      const int64_t end = s + walk.batch < last ? s + walk.batch : last;
      for (int64_t left = 0; left < width; left += kLine) {
        const int64_t count = width - left < kLine ? width - left : kLine;
        if (args.has_tokens) {
          for (int64_t row = s; row < end; ++row)
            lines_of_row_segment<T>(args.pool, part, row, left, count, lines + kLanes<T> * kLine,
                                    lines + (row - s) * walk.stride);
        }
        for (int64_t lane = 0; lane < part.count; ++lane) {
          for (int64_t row = s; row < end; ++row) {
            const Acc<T>* line = args.has_tokens ? lines + lane * kLine + (row - s) * walk.stride : nullptr;
            for (int64_t y = rows.segment_start[row]; y < rows.segment_start[row + 1]; ++y)
              visit(group + lane, row, y, left, count, line);
          }
        }
      }
    }
  }
}

// The gradient of z along `count` ≤ lanes columns.
template <class T>
ANNNET_INLINE Vec<T> gradient_along_row(const T* grad_map, int64_t stride, const Acc<T>* line, int64_t count) {
  Vec<T> grad = line == nullptr ? Vec<T>{} : load_lanes(line, 1, count);
  if (grad_map != nullptr) grad += load_lanes(grad_map, stride, count);
  return grad;
}

template <class T>
void bn_relu_sums_rows(const BnReluArgs& args, PoolUnit unit, int64_t first, int64_t last, void* sums, void* scratch) {
  const PoolMap& map = args.pool.map;
  Acc<T>* const totals = static_cast<Acc<T>*>(sums);
  memset(totals, 0, static_cast<size_t>((last - first) * 2 * args.pool.block) * sizeof(Acc<T>));
  visit_rows<T>(args, unit, first, last, scratch,
                [&](int64_t lane, int64_t segment, int64_t row, int64_t left, int64_t columns, const Acc<T>* line) {
                  const int64_t channel = unit.channel + lane;
                  const T* y = at<T>(map, unit.image, channel, row, left);
                  const T* grad = args.has_map ? at<T>(args.grad_map, unit.image, channel, row, left) : nullptr;
                  BnReluSums<T> total = {BnRelu<T>::of_channel(args.pool.norm, channel)};
                  for (int64_t x = 0; x < columns; x += kLanes<T>) {
                    prefetch(y + x * map.column);
                    if (grad != nullptr) prefetch(grad + x * args.grad_map.column);
                    total.add(
                        load_lanes(y + x * map.column, map.column, columns - x),
                        gradient_along_row(grad == nullptr ? nullptr : grad + x * args.grad_map.column,
                                           args.grad_map.column, line == nullptr ? nullptr : line + x, columns - x));
                  }
                  Acc<T>* target = totals + (segment - first) * 2 * args.pool.block + lane;
                  target[0] += sum_lanes(total.sum_g);
                  target[args.pool.block] += sum_lanes(total.sum_gy);
                });
}

template <class T>
void bn_relu_input_rows(const BnReluArgs& args, PoolUnit unit, int64_t first, int64_t last, void* scratch) {
  const PoolMap& map = args.pool.map;
  const bool frozen = args.mean_sums == nullptr;
  visit_rows<T>(args, unit, first, last, scratch,
                [&](int64_t lane, int64_t, int64_t row, int64_t left, int64_t columns, const Acc<T>* line) {
                  const int64_t channel = unit.channel + lane;
                  const T* y = at<T>(map, unit.image, channel, row, left);
                  const T* grad = args.has_map ? at<T>(args.grad_map, unit.image, channel, row, left) : nullptr;
                  T* dy = writable_at<T>(args.dy, unit.image, channel, row, left);
                  const auto input = BnReluInput<T>::of_channel(args, channel);
                  for (int64_t x = 0; x < columns; x += kLanes<T>) {
                    prefetch(y + x * map.column);
                    if (grad != nullptr) prefetch(grad + x * args.grad_map.column);
                    prefetch_to_write(dy + x * args.dy.column);
                    const Vec<T> gradient =
                        gradient_along_row(grad == nullptr ? nullptr : grad + x * args.grad_map.column,
                                           args.grad_map.column, line == nullptr ? nullptr : line + x, columns - x);
                    const Vec<T> value =
                        input(load_lanes(y + x * map.column, map.column, columns - x), gradient, frozen);
                    store_lanes(dy + x * args.dy.column, args.dy.column, value, columns - x);
                  }
                });
}

// Calls visit(row segment, row, first column, columns, c, count, cell) for every run of pixels of a unit that have the
// same gradient from the tokens, and every vector of their channels; `cell` is that gradient, zero if there is none.
template <class T, class Visit>
ANNNET_INLINE void visit_channels(const BnReluArgs& args, PoolUnit unit, int64_t first, int64_t last, void* scratch,
                                  const Visit& visit) {
  const PoolAxis& rows = args.pool.rows;
  const PoolAxis& columns = args.pool.columns;
  const int64_t block = args.pool.block;
  Acc<T>* cells = static_cast<Acc<T>*>(scratch);
  for (int64_t row = first; row < last; ++row) {
    if (args.has_tokens) cells_of_row_segment<T>(args.pool, unit, block, row, cells + columns.segments * block, cells);
    for (int64_t s = 0; s < columns.segments; ++s) {
      const int64_t left = columns.segment_start[s], count = columns.segment_start[s + 1] - left;
      for (int64_t y = rows.segment_start[row]; y < rows.segment_start[row + 1]; ++y) {
        for (int64_t c = 0; c < unit.count; c += kLanes<T>)
          visit(row, y, left, count, c, unit.count - c < kLanes<T> ? unit.count - c : kLanes<T>,
                args.has_tokens ? load(cells + s * block + c) : Vec<T>{});
      }
    }
  }
}

template <class T>
void bn_relu_sums_channels(const BnReluArgs& args, PoolUnit unit, int64_t first, int64_t last, void* sums,
                           void* scratch) {
  Acc<T>* const totals = static_cast<Acc<T>*>(sums);
  memset(totals, 0, static_cast<size_t>((last - first) * 2 * args.pool.block) * sizeof(Acc<T>));
  visit_channels<T>(
      args, unit, first, last, scratch,
      [&](int64_t segment, int64_t row, int64_t left, int64_t columns, int64_t c, int64_t count, Vec<T> cell) {
        const int64_t channel = unit.channel + c;
        Acc<T>* target = totals + (segment - first) * 2 * args.pool.block + c;
        BnReluSums<T> total = {BnRelu<T>::of_channels(args.pool.norm, channel, count), load(target),
                               load(target + args.pool.block)};
        for (int64_t x = left; x < left + columns; ++x) {
          const T* y = at<T>(args.pool.map, unit.image, channel, row, x);
          prefetch(y);
          Vec<T> grad = cell;
          if (args.has_map) {
            const T* source = at<T>(args.grad_map, unit.image, channel, row, x);
            prefetch(source);
            grad += load_lanes(source, args.grad_map.channel, count);
          }
          total.add(load_lanes(y, 1, count), grad);
        }
        store(target, total.sum_g);
        store(target + args.pool.block, total.sum_gy);
      });
}

template <class T>
void bn_relu_input_channels(const BnReluArgs& args, PoolUnit unit, int64_t first, int64_t last, void* scratch) {
  const bool frozen = args.mean_sums == nullptr;
  visit_channels<T>(args, unit, first, last, scratch,
                    [&](int64_t, int64_t row, int64_t left, int64_t columns, int64_t c, int64_t count, Vec<T> cell) {
                      const int64_t channel = unit.channel + c;
                      const auto input = BnReluInput<T>::of_channels(args, channel, count);
                      for (int64_t x = left; x < left + columns; ++x) {
                        const T* y = at<T>(args.pool.map, unit.image, channel, row, x);
                        T* dy = writable_at<T>(args.dy, unit.image, channel, row, x);
                        prefetch(y);
                        prefetch_to_write(dy);
                        Vec<T> grad = cell;
                        if (args.has_map) {
                          const T* source = at<T>(args.grad_map, unit.image, channel, row, x);
                          prefetch(source);
                          grad += load_lanes(source, args.grad_map.channel, count);
                        }
                        store_lanes(dy, args.dy.channel, input(load_lanes(y, 1, count), grad, frozen), count);
                      }
                    });
}

constexpr BnReluPoolKernels bn_relu_pool_kernels = {
    .sums_rows = ANNNET_PER_DTYPE(bn_relu_sums_rows),
    .sums_channels = ANNNET_PER_DTYPE(bn_relu_sums_channels),
    .input_rows = ANNNET_PER_DTYPE(bn_relu_input_rows),
    .input_channels = ANNNET_PER_DTYPE(bn_relu_input_channels),
};

}  // namespace annnet::ANNNET_LEVEL
