// Copies of parts of maps and tokens as operands of matrix_tile.h: k-major, widened, in whatever strides they come.
#pragma once

#include "matrix_tile.h"
#include "memory.h"
#include "pyramid_pool_kernels.h"
#include "transpose.h"

namespace annnet::ANNNET_LEVEL {

// Positions (pixels or tokens) are packed in blocks of at most six cache lines.
template <class T>
constexpr int kBlock = 384 / static_cast<int>(sizeof(Acc<T>));

// Whether an operand's elements are as they lie in a map of elements T.
template <class T>
constexpr bool kReadInPlace = Operand<T>::kStep == 1 && sizeof(T) == sizeof(Acc<T>);

// Elements (channel, position) of a map, of tokens or of a buffer, for one block of positions.
template <class T>
struct Positions {
  const T* data;
  int64_t channel_stride;
  const NormTable* norm = nullptr;  // normalise and rectify on load
  int64_t count = 0;
  int64_t offset[kBlock<T>];
  bool adjacent[kBlock<T> / kLanes<T>];  // whether a vector's positions lie next to each other
  int64_t step;                          // from each position to the next, 0 where that differs

  // Appends `length` positions, the first at `from` and each `stride` after the one before.
  void append(int64_t from, int64_t stride, int64_t length) {
    for (int64_t i = 0; i < length; ++i) offset[count++] = from + i * stride;
  }

  // The first position, where kReadInPlace.
  const Element<T>* operand() const { return reinterpret_cast<const Element<T>*>(data + offset[0]); }

  void find_steps() {
    step = count > 1 ? offset[1] - offset[0] : 0;
    for (int64_t i = 2; i < count; ++i)
      if (offset[i] - offset[i - 1] != step) step = 0;
    for (int64_t begin = 0; begin < count; begin += kLanes<T>) {
      const int64_t last = minimum(begin + kLanes<T>, count) - 1;
      bool& all = adjacent[begin / kLanes<T>];
      all = true;
      for (int64_t i = begin; i < last; ++i) all &= offset[i + 1] == offset[i] + 1;
    }
  }
};

// What lies outside keeps its zero.
template <bool kChannelRows, class T>
ANNNET_INLINE void rectify(const NormTable& norm, int64_t channel, int64_t channels, int64_t positions,
                           Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (kChannelRows) {
    for (int i = 0; i < kLanes<T>; ++i)
      if (i < channels) rows[i] = BnRelu<T>::of_channel(norm, channel + i)(rows[i]);
  } else {
    const BnRelu<T> function = BnRelu<T>::of_channels(norm, channel, channels);
    for (int i = 0; i < kLanes<T>; ++i)
      if (i < positions) rows[i] = function(rows[i]);
  }
}

// The block of one vector of channels from `channel` to at most `channel_end`, and of one group of positions. Each row
// is a channel (kChannelRows) or a position; what lies outside is zero.
template <bool kChannelRows, class T>
ANNNET_INLINE void load_block(const Positions<T>& source, int64_t channel, int64_t channel_end, int64_t group,
                              Vec<T> (&rows)[kLanes<T>]) {
  constexpr int kWidth = kLanes<T>;
  const int64_t* offset = source.offset + group * kWidth;
  const int64_t channels = minimum(channel_end - channel, kWidth);
  const int64_t positions = minimum(source.count - group * kWidth, kWidth);
  const T* first = source.data + channel * source.channel_stride;
  if (source.channel_stride == 1) {
    for (int i = 0; i < kWidth; ++i) rows[i] = i < positions ? load_lanes(first + offset[i], 1, channels) : Vec<T>{};
    if constexpr (kChannelRows) transpose(rows);
  } else if (source.adjacent[group]) {
    for (int i = 0; i < kWidth; ++i)
      rows[i] = i < channels ? load_lanes(first + offset[0] + i * source.channel_stride, 1, positions) : Vec<T>{};
    if constexpr (!kChannelRows) transpose(rows);
  } else {
    Acc<T> elements[kWidth][kWidth] = {};
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < positions; ++p)
        (kChannelRows ? elements[c][p] : elements[p][c]) = load_one(first + c * source.channel_stride + offset[p]);
    for (int i = 0; i < kWidth; ++i) rows[i] = load(elements[i]);
  }
  if (source.norm != nullptr) rectify<kChannelRows, T>(*source.norm, channel, channels, positions, rows);
}

// A vector of row `row` from column `column` on, of the matrix whose rows are channels (kChannelRows) or positions.
template <bool kChannelRows, class T>
ANNNET_INLINE Vec<T> load_row(const Positions<T>& source, int64_t row, int64_t column, int64_t columns) {
  const int64_t count = minimum(columns - column, kLanes<T>);
  if constexpr (kChannelRows) {
    const T* first = source.data + row * source.channel_stride;
    if (source.adjacent[column / kLanes<T>]) return load_lanes(first + source.offset[column], 1, count);
    T elements[kLanes<T>] = {};
    for (int64_t i = 0; i < count; ++i) elements[i] = first[source.offset[column + i]];
    return load(elements);
  } else {
    return load_lanes(source.data + source.offset[row] + column * source.channel_stride, source.channel_stride, count);
  }
}

// Stores the rows from k on as an operand of elements T, `count` of them.
template <class T>
ANNNET_INLINE void store_rows(Element<T>* target, int64_t stride, const Vec<T> (&rows)[kLanes<T>], int64_t count) {
#ifdef ANNNET_BF16_DOT
  if constexpr (Operand<T>::kStep == 2) {
    for (int i = 0; i < kLanes<T>; i += 2)
      if (i < count) {
        const __m256i low = bit_cast<__m256i>(_mm512_cvtneps_pbh(rows[i]));
        const __m256i high = bit_cast<__m256i>(_mm512_cvtneps_pbh(rows[i + 1]));
        const __m512i pairs =
            _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        _mm512_storeu_si512(target + i / 2 * stride, pairs);
      }
    return;
  }
#endif
  for (int i = 0; i < kLanes<T>; ++i)
    if (i < count) memcpy(target + i * stride, &rows[i], sizeof rows[i]);
}

// Operand of elements T with k = channel: target[channel - begin][position]. `S` is T, or Acc<T> for a buffer.
template <class T, class S>
inline void pack_channels(const Positions<S>& source, int64_t begin, int64_t end, Element<T>* target, int64_t stride) {
  for (int64_t channel = begin; channel < end; channel += kLanes<T>)
    for (int64_t group = 0; group * kLanes<T> < source.count; ++group) {
      Vec<T> rows[kLanes<T>];
      load_block<true>(source, channel, end, group, rows);
      store_rows<T>(target + (channel - begin) / Operand<T>::kStep * stride + group * kLanes<T>, stride, rows,
                    end - channel);
    }
}

// One group of positions of the operand below.
template <class T, class S>
inline void pack_group(const Positions<S>& source, int64_t group, int64_t begin, int64_t end, Element<T>* target,
                       int64_t stride) {
  for (int64_t channel = begin; channel < end; channel += kLanes<T>) {
    Vec<T> rows[kLanes<T>];
    load_block<false>(source, channel, end, group, rows);
    store_rows<T>(target + group * kLanes<T> / Operand<T>::kStep * stride + (channel - begin), stride, rows,
                  source.count - group * kLanes<T>);
  }
}

// Operand of elements T with k = position: target[position][channel - begin].
template <class T, class S>
inline void pack_positions(const Positions<S>& source, int64_t begin, int64_t end, Element<T>* target, int64_t stride) {
  for (int64_t group = 0; group * kLanes<T> < source.count; ++group)
    pack_group<T>(source, group, begin, end, target, stride);
}

}  // namespace annnet::ANNNET_LEVEL
