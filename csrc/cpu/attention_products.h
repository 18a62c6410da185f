// The three products of the asymmetric attention for one block of pixels, which stays in the second cache: over
// channels (logits, and gradients of probabilities), over tokens (what maps get) and over pixels (what tokens get).
//
// Weights (logits, probabilities, their gradients) are held by token, a row per token and a column per pixel, or by
// pixel, a row per pixel and a column per token. By token suits maps whose pixels are neighbours (NCHW), by pixel those
// whose channels are (channels_last): a map that has the layout of the one that is written is not transposed, which
// took 9 % of the time of the forward and backward in channels_last. Operands that are pairs are always by token.
#pragma once

#include "attention_memory.h"

namespace annnet::ANNNET_LEVEL {

// ---- where the elements are ----

// Pixels of one image.
struct Block {
  int64_t image;
  Range pixels;
};

template <class T>
Block block_of(const Attention& args, int64_t index) {
  const int64_t blocks = args.plan.blocks;
  return {index / blocks, piece<T>(args.sizes.pixels, blocks, index % blocks)};
}

// A block's memory in a map; nothing where neither its pixels nor its channels are neighbours.
template <class T>
ReadAhead ahead_of(const PoolMap& map, int64_t channels, int64_t width, Block block) {
  constexpr int64_t kStep = 16;  // bytes: with 256 channels, a block is asked for in half the steps of a block
  const int64_t row = block.pixels.begin / width, column = block.pixels.begin % width;
  const T* const first =
      static_cast<const T*>(map.data) + block.image * map.batch + row * map.row + column * map.column;
  const int64_t pixels = block.pixels.end - block.pixels.begin;
  if (map.column == 1) return ReadAhead::of_rows(first, map.channel, pixels, channels, kStep);
  if (map.channel == 1) return ReadAhead::of_rows(first, map.column, channels, pixels, kStep);
  return {};
}

template <class T>
void set_pixels(Positions<T>& positions, const PoolMap& map, int64_t width, Block block) {
  positions.data = static_cast<const T*>(map.data) + block.image * map.batch;
  positions.channel_stride = map.channel;
  positions.count = 0;
  for (int64_t pixel = block.pixels.begin; pixel < block.pixels.end;) {
    const int64_t row = pixel / width, column = pixel % width;
    const int64_t length = minimum(width - column, block.pixels.end - pixel);
    positions.append(row * map.row + column * map.column, map.column, length);
    pixel += length;
  }
  positions.find_steps();
}

// Positions at one stride.
template <class T>
void set_line(Positions<T>& positions, const T* data, int64_t channel_stride, int64_t stride, int64_t count) {
  positions.data = data;
  positions.channel_stride = channel_stride;
  positions.count = 0;
  positions.append(0, stride, count);
  positions.find_steps();
}

template <class T>
void set_tokens(Positions<T>& positions, const PoolTokens& tokens, int64_t image, Range range) {
  set_line(positions, static_cast<const T*>(tokens.data) + image * tokens.batch + range.begin * tokens.token,
           tokens.channel, tokens.token, range.end - range.begin);
}

// Weights by token.
template <class A>
void set_buffer(Positions<A>& positions, const A* buffer, int64_t pixels) {
  set_line(positions, buffer, kBlockStride<A>, 1, pixels);
}

// ---- the three products ----

// From each row of a block's weights to the next.
template <bool kByPixel, class T>
int64_t weights_stride(int64_t tokens) {
  return kByPixel ? leading_dimension<T>(tokens) : kBlockStride<T>;
}

// Some channels of a block of a map as an operand: a row per channel, or per pixel (kByPixel).
template <class T>
struct MapRows {
  const Element<T>* data;
  int64_t stride;
};

// Calls work(begin, end, rows) with the channels begin … end - 1 of a block of a map, chunk by chunk: the map's own
// memory where the products can read it, else a copy in `chunk`.
template <bool kByPixel, class T, class Work>
void for_chunks(const Positions<T>& map, int64_t channels, Element<T>* chunk, const Work& work) {
  const int64_t neighbour = kByPixel ? map.channel_stride : map.step, stride = kByPixel ? map.step : map.channel_stride;
  const bool in_place = kReadInPlace<T> && map.norm == nullptr && neighbour == 1 && stride > 0 &&
                        map.count % (kByPixel ? kTileRows : kLanes<T>) == 0 && channels % kTileRows == 0;
  constexpr int64_t kStride = kByPixel ? leading_dimension<T>(kChunk) : kBlockStride<T>;
  for (int64_t begin = 0; begin < channels; begin += kChunk) {
    const int64_t end = minimum(begin + kChunk, channels);
    if (in_place) {
      work(begin, end, MapRows<T>{map.operand() + begin * map.channel_stride, stride});
      continue;
    }
    if constexpr (kByPixel)
      pack_positions<T>(map, begin, end, chunk, kStride);
    else
      pack_channels<T>(map, begin, end, chunk, kStride);
    work(begin, end, MapRows<T>{chunk, kStride});
  }
}

// weights(token, pixel) (+)= Σ_channel tokens[channel][token] map(channel, pixel), over the channels of a chunk
template <bool kByPixel, class T>
void contract_channels(int64_t begin, int64_t end, int64_t pixels, int64_t tokens, const Element<T>* by_channel,
                       MapRows<T> rows, Acc<T>* weights, ReadAhead& ahead) {
  const int64_t stride = leading_dimension<T>(tokens), depth = end - begin;
  const Element<T>* const chunk = by_channel + begin / Operand<T>::kStep * stride;
  const ToBuffer<Acc<T>> sink{weights, weights_stride<kByPixel, T>(tokens), begin > 0};
  if constexpr (kByPixel)
    multiply(pixels, tokens, depth, ByRow<Element<T>>{rows.data, rows.stride}, chunk, stride, sink, ahead);
  else
    multiply(tokens, pixels, depth, ByDepth<Element<T>>{chunk, stride}, rows.data, rows.stride, sink, ahead);
}

// What is added to a block of a map as it is written: pixels of another map and one value per channel. Null: nothing.
template <class T>
struct Addends {
  const Positions<T>* skip;
  const Acc<T>* constant;
};

// Sink: `rows` × `columns` of a dense map whose rows are channels (kChannelRows) or pixels, plus what is to be added.
template <bool kChannelRows, class T>
struct ToMap {
  T* target;
  int64_t stride, rows, columns;
  Addends<T> addends;
  WriteAhead ahead = {};

  // In NCHW a tile is short pieces of rows far apart. In channels_last, whole lines, this gains only where a map is
  // read there.
  ANNNET_INLINE void begin(int64_t column, int64_t count) {
    if (kChannelRows || addends.skip != nullptr)
      ahead = WriteAhead::of_rows(target + column, stride, minimum(count, columns - column), rows, 64);
  }
  ANNNET_INLINE void expect() { ahead.advance(); }
  ANNNET_INLINE void operator()(int64_t row, int64_t column, Vec<T> value) const {
    if (row >= rows) return;
    if (addends.skip != nullptr) value += load_row<kChannelRows>(*addends.skip, row, column, columns);
    if (addends.constant != nullptr)
      value += kChannelRows ? broadcast<T>(addends.constant[row])
                            : load_lanes(addends.constant + column, 1, columns - column);
    store_lanes(target + row * stride + column, 1, value, columns - column);
  }
};

// map(channel, pixel) = Σ_token tokens[token][channel] weights(token, pixel), plus what is to be added
template <bool kByPixel, class T>
void contract_tokens(const Attention& args, void* map, int64_t channels, Block block, const Element<T>* by_token,
                     const Element<T>* weights, const Addends<T>& addends, ReadAhead& ahead) {
  const AttentionSizes& s = args.sizes;
  const int64_t stride = leading_dimension<T>(channels), count = block.pixels.end - block.pixels.begin;
  T* const target = static_cast<T*>(map) + block.image * s.pixels * channels;
  const auto by_channel = [&] {
    const ToMap<true, T> sink{target + block.pixels.begin, s.pixels, channels, count, addends};
    multiply(channels, count, s.tokens, ByDepth<Element<T>>{by_token, stride}, weights, kBlockStride<T>, sink, ahead);
  };
  const auto by_pixel = [&](const auto& rows) {
    const ToMap<false, T> sink{target + block.pixels.begin * channels, channels, count, channels, addends};
    multiply(count, channels, s.tokens, rows, by_token, stride, sink, ahead);
  };
  if constexpr (kByPixel)
    by_pixel(ByRow<Element<T>>{weights, leading_dimension<T>(s.tokens)});
  else if constexpr (Operand<T>::kStep == 1)
    by_channel();
  else if (args.channels_last)
    by_pixel(ByDepth<Element<T>>{weights, kBlockStride<T>});
  else
    by_channel();
}

// sums[channel][token] (+)= Σ_pixel map(channel, pixel) weights[pixel][token], for the channels of a chunk. Its rows
// serve as they are, unless their pairs are of channels: then the map is packed again, in pairs of pixels.
template <bool kByPixel, class T>
void contract_pixels(const Positions<T>& map, int64_t begin, int64_t end, int64_t tokens,
                     const Element<T>* weights_by_pixel, MapRows<T> rows, Element<T>* chunk, Acc<T>* sums, bool add,
                     ReadAhead& ahead) {
  const int64_t stride = leading_dimension<T>(tokens), count = end - begin;
  const ToBuffer<Acc<T>> sink{sums + begin * stride, stride, add};
  if constexpr (Operand<T>::kStep > 1) {
    const int64_t chunk_stride = leading_dimension<T>(count);
    pack_positions<T>(map, begin, end, chunk, chunk_stride);
    multiply(count, tokens, map.count, ByDepth<Element<T>>{chunk, chunk_stride}, weights_by_pixel, stride, sink, ahead);
  } else if constexpr (kByPixel) {
    multiply(count, tokens, map.count, ByDepth<Element<T>>{rows.data, rows.stride}, weights_by_pixel, stride, sink,
             ahead);
  } else {
    multiply(count, tokens, map.count, ByRow<Element<T>>{rows.data, rows.stride}, weights_by_pixel, stride, sink,
             ahead);
  }
}

// The operand with k = token of weights: themselves, unless operands are pairs.
template <class T>
const Element<T>* as_operand(const Acc<T>* weights, int64_t tokens, int64_t pixels, Element<T>* target) {
  if constexpr (Operand<T>::kStep == 1) {
    return weights;
  } else {
    Positions<Acc<T>> buffer;
    set_buffer(buffer, weights, pixels);
    pack_channels<T>(buffer, 0, tokens, target, kBlockStride<T>);
    return target;
  }
}

// The operand with k = pixel of a block's weights: themselves, or where they are by token a copy, for which every group
// of pixels is taken over, by a call, while it is in the first cache. Where `copy` is null, no operand is asked for.
template <bool kByPixel, class T>
struct PixelRows {
  const Acc<T>* weights = nullptr;
  int64_t tokens = 0;
  Element<T>* copy = nullptr;
  Positions<Acc<T>> by_token;

  PixelRows() = default;
  PixelRows(const Acc<T>* weights, int64_t tokens, int64_t pixels, Element<T>* copy)
      : weights(weights), tokens(tokens), copy(copy) {
    if (!kByPixel && copy != nullptr) set_buffer(by_token, weights, pixels);
  }

  void operator()(int64_t group) const {
    if (copy != nullptr) pack_group<T>(by_token, group, 0, tokens, copy, leading_dimension<T>(tokens));
  }

  const Element<T>* data() const {
    if constexpr (kByPixel)
      return weights;
    else
      return copy;
  }
};

}  // namespace annnet::ANNNET_LEVEL
