// Asymmetric attention, forward and backward, one block of pixels at a time: the block's logits, probabilities and
// packed channels stay in the second cache, and every product is matrix_tile.h's.
#pragma once

#include "attention_memory.h"
#include "softmax.h"

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

// A buffer of one row per token and one column per pixel of a block.
template <class A>
void set_buffer(Positions<A>& positions, const A* buffer, int64_t pixels) {
  set_line(positions, buffer, kBlockStride<A>, 1, pixels);
}

// ---- the three products ----

// A part of a map as an operand with k = channel.
template <class T>
struct ChannelRows {
  const Element<T>* data;
  int64_t stride;
};

// Calls work(begin, end, rows) with the channels begin … end - 1 of a block of a map, chunk by chunk: the map's own
// memory where a product can read it (in NCHW; 4 % of the time of the attention), else a copy in `chunk`.
template <class T, class Work>
void for_chunks(const Positions<T>& map, int64_t channels, Element<T>* chunk, const Work& work) {
  const bool in_place = kReadInPlace<T> && map.norm == nullptr && map.step == 1 && map.count % kLanes<T> == 0 &&
                        channels % kTileRows == 0;
  for (int64_t begin = 0; begin < channels; begin += kChunk) {
    const int64_t end = minimum(begin + kChunk, channels);
    if (in_place) {
      work(begin, end, ChannelRows<T>{map.operand() + begin * map.channel_stride, map.channel_stride});
    } else {
      pack_channels<T>(map, begin, end, chunk, kBlockStride<T>);
      work(begin, end, ChannelRows<T>{chunk, kBlockStride<T>});
    }
  }
}

// result[token][pixel] (+)= Σ_channel tokens[channel][token] map[channel][pixel], over the channels of a chunk
template <class T>
void contract_channels(int64_t begin, int64_t end, int64_t pixels, int64_t tokens, const Element<T>* by_channel,
                       ChannelRows<T> rows, Acc<T>* result, ReadAhead& ahead) {
  const int64_t stride = leading_dimension<T>(tokens);
  multiply<T>(tokens, pixels, end - begin, ByDepth<T>{by_channel + begin / Operand<T>::kStep * stride, stride},
              rows.data, rows.stride, ToBuffer<T>{result, kBlockStride<T>, begin > 0}, ahead);
}

// Sink: `rows` × `columns` of a dense map whose rows are channels (kChannelRows) or pixels, plus an addend if given.
template <bool kChannelRows, class T>
struct ToMap {
  T* target;
  int64_t stride, rows, columns;
  const Positions<T>* addend;
  WriteAhead ahead = {};

  ToMap(T* target, int64_t stride, int64_t rows, int64_t columns, const Positions<T>* addend)
      : target(target), stride(stride), rows(rows), columns(columns), addend(addend) {
    // In NCHW a tile is short pieces of rows far apart. In channels_last, whole lines, this gains only where an addend
    // is read there: 4.9 instead of 5.4 ms for 512 channels.
    if (kChannelRows || addend != nullptr) ahead = WriteAhead::of_rows(target, stride, columns, rows, 64);
  }

  ANNNET_INLINE void expect() { ahead.advance(); }
  ANNNET_INLINE void operator()(int64_t row, int64_t column, Vec<T> value) const {
    if (row >= rows) return;
    if (addend != nullptr) value += load_row<kChannelRows>(*addend, row, column, columns);
    store_lanes(target + row * stride + column, 1, value, columns - column);
  }
};

// map[channel][pixel] = Σ_token tokens[token][channel] weights[token][pixel], plus an addend if given
template <class T>
void contract_tokens(const Attention& args, void* map, int64_t channels, Block block, const Element<T>* by_token,
                     const Element<T>* weights, const Positions<T>* addend, ReadAhead& ahead) {
  const AttentionSizes& s = args.sizes;
  const int64_t stride = leading_dimension<T>(channels), count = block.pixels.end - block.pixels.begin;
  T* const target = static_cast<T*>(map) + block.image * s.pixels * channels;
  if (args.channels_last)
    multiply<T>(count, channels, s.tokens, ByDepth<T>{weights, kBlockStride<T>}, by_token, stride,
                ToMap<false, T>{target + block.pixels.begin * channels, channels, count, channels, addend}, ahead);
  else
    multiply<T>(channels, count, s.tokens, ByDepth<T>{by_token, stride}, weights, kBlockStride<T>,
                ToMap<true, T>{target + block.pixels.begin, s.pixels, channels, count, addend}, ahead);
}

// sums[channel][token] (+)= Σ_pixel map[channel][pixel] weights[pixel][token], for the channels of a chunk. Its rows
// serve as they are, unless their pairs are of channels: then the map is packed again, in pairs of pixels.
template <class T>
void contract_pixels(const Positions<T>& map, int64_t begin, int64_t end, int64_t tokens,
                     const Element<T>* weights_by_pixel, ChannelRows<T> rows, Element<T>* chunk, Acc<T>* sums, bool add,
                     ReadAhead& ahead) {
  const int64_t stride = leading_dimension<T>(tokens);
  const ToBuffer<T> sink{sums + begin * stride, stride, add};
  if constexpr (Operand<T>::kStep == 1) {
    multiply<T>(end - begin, tokens, map.count, ByRow<T>{rows.data, rows.stride}, weights_by_pixel, stride, sink,
                ahead);
  } else {
    const int64_t chunk_stride = leading_dimension<T>(end - begin);
    pack_positions<T>(map, begin, end, chunk, chunk_stride);
    multiply<T>(end - begin, tokens, map.count, ByDepth<T>{chunk, chunk_stride}, weights_by_pixel, stride, sink, ahead);
  }
}

// The operand with k = token of a buffer of weights: the buffer itself where operands are not pairs.
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

template <class T>
void transpose_weights(const Acc<T>* weights, int64_t tokens, int64_t pixels, Element<T>* target) {
  Positions<Acc<T>> buffer;
  set_buffer(buffer, weights, pixels);
  pack_positions<T>(buffer, 0, tokens, target, leading_dimension<T>(tokens));
}

// ---- the table's functions ----

template <class T>
void pack_attention(const Attention& args, bool backward, int64_t begin, int64_t end) {
  const AttentionSizes& s = args.sizes;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / args.plan.token_blocks;
    const Range range = piece<T>(s.tokens, args.plan.token_blocks, index % args.plan.token_blocks);
    const PackedTokens<T> packed(args.packed + image * args.plan.packed_bytes, s, backward);
    const int64_t row = range.begin / Operand<T>::kStep;
    Positions<T> tokens;
    set_tokens(tokens, args.key, image, range);
    pack_channels<T>(tokens, 0, s.key_channels, packed.key_by_channel + range.begin, packed.token_stride);
    if (backward)
      pack_positions<T>(tokens, 0, s.key_channels, packed.key_by_token + row * packed.key_stride, packed.key_stride);
    set_tokens(tokens, args.value, image, range);
    if (backward)
      pack_channels<T>(tokens, 0, s.value_channels, packed.value_by_channel + range.begin, packed.token_stride);
    else
      pack_positions<T>(tokens, 0, s.value_channels, packed.value_by_token + row * packed.value_stride,
                        packed.value_stride);
  }
}

template <class T>
void attention_forward(const Attention& args, char* memory, int64_t begin, int64_t end) {
  const AttentionSizes& s = args.sizes;
  const Scratch<T> scratch(memory, s, false);
  const bool add = args.addend.data != nullptr;
  Positions<T> query, addend;
  if (args.rectify) query.norm = &args.norm;
  for (int64_t index = begin; index < end; ++index) {
    const Block block = block_of<T>(args, index);
    const PackedTokens<T> packed(args.packed + block.image * args.plan.packed_bytes, s, false);
    ReadAhead ahead =
        index + 1 < end ? ahead_of<T>(args.query, s.key_channels, s.width, block_of<T>(args, index + 1)) : ReadAhead{};
    set_pixels(query, args.query, s.width, block);
    for_chunks(query, s.key_channels, scratch.chunk, [&](int64_t begin, int64_t end, ChannelRows<T> rows) {
      contract_channels<T>(begin, end, query.count, s.tokens, packed.key_by_channel, rows, scratch.probabilities,
                           ahead);
    });
    softmax(scratch.probabilities, s.tokens, query.count, static_cast<Acc<T>>(args.scale),
            static_cast<Acc<T>*>(args.logsumexp) + block.image * s.pixels + block.pixels.begin);
    if (add) set_pixels(addend, args.addend, s.width, block);
    contract_tokens<T>(args, args.out, s.value_channels, block, packed.value_by_token,
                       as_operand<T>(scratch.probabilities, s.tokens, query.count, scratch.weights),
                       add ? &addend : nullptr, ahead);
  }
}

template <class T>
void attention_backward(const Attention& args, char* memory, int64_t begin, int64_t end) {
  const AttentionSizes& s = args.sizes;
  const Scratch<T> scratch(memory, s, true);
  const Acc<T> scale = static_cast<Acc<T>>(args.scale);
  Positions<T> query, gradient;
  if (args.rectify) query.norm = &args.norm;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / args.plan.splits, split = index % args.plan.splits;
    const PackedTokens<T> packed(args.packed + image * args.plan.packed_bytes, s, true);
    const Sums<T> sums(args.sums + index * args.plan.sums_bytes, s);
    const int64_t first = image * args.plan.blocks + args.plan.blocks * split / args.plan.splits;
    const int64_t last = image * args.plan.blocks + args.plan.blocks * (split + 1) / args.plan.splits - 1;
    for (int64_t number = first; number <= last; ++number) {
      const Block block = block_of<T>(args, number);
      ReadAhead ahead = ahead_of<T>(args.grad_out, s.value_channels, s.width, block);
      set_pixels(query, args.query, s.width, block);
      set_pixels(gradient, args.grad_out, s.width, block);
      for_chunks(query, s.key_channels, scratch.chunk, [&](int64_t begin, int64_t end, ChannelRows<T> rows) {
        contract_channels<T>(begin, end, query.count, s.tokens, packed.key_by_channel, rows, scratch.probabilities,
                             ahead);
      });
      softmax<Acc<T>>(scratch.probabilities, s.tokens, query.count, scale, nullptr);
      if (args.needs_value)
        transpose_weights<T>(scratch.probabilities, s.tokens, query.count, scratch.weights_by_pixel);
      for_chunks(gradient, s.value_channels, scratch.chunk, [&](int64_t begin, int64_t end, ChannelRows<T> rows) {
        if (args.needs_query || args.needs_key)
          contract_channels<T>(begin, end, query.count, s.tokens, packed.value_by_channel, rows,
                               scratch.logit_gradients, ahead);
        if (args.needs_value)
          contract_pixels(gradient, begin, end, s.tokens, scratch.weights_by_pixel, rows, scratch.chunk, sums.dvalue,
                          number > first, ahead);
      });
      if (!args.needs_query && !args.needs_key) continue;
      softmax_gradient(scratch.logit_gradients, scratch.probabilities, s.tokens, query.count, scale);
      if (number < last) ahead = ahead_of<T>(args.query, s.key_channels, s.width, block_of<T>(args, number + 1));
      if (args.needs_query)
        contract_tokens<T>(args, args.dquery, s.key_channels, block, packed.key_by_token,
                           as_operand<T>(scratch.logit_gradients, s.tokens, query.count, scratch.weights), nullptr,
                           ahead);
      if (args.needs_key) {
        transpose_weights<T>(scratch.logit_gradients, s.tokens, query.count, scratch.weights_by_pixel);
        for_chunks(query, s.key_channels, scratch.chunk, [&](int64_t begin, int64_t end, ChannelRows<T> rows) {
          contract_pixels(query, begin, end, s.tokens, scratch.weights_by_pixel, rows, scratch.chunk, sums.dkey,
                          number > first, ahead);
        });
      }
    }
  }
}

// target[token][channel] = Σ sums[channel][token] of the splits, in their order, for `count` ≤ lanes tokens.
template <class T>
void reduce_tokens(const Acc<T>* sums, int64_t stride, const AttentionPlan& plan, int64_t channels, int64_t count,
                   T* target) {
  for (int64_t channel = 0; channel < channels; channel += kLanes<T>) {
    Vec<T> square[kLanes<T>] = {};
    for (int64_t i = 0; i < minimum(channels - channel, kLanes<T>); ++i)
      for (int64_t split = 0; split < plan.splits; ++split) {
        const char* const start = reinterpret_cast<const char*>(sums + (channel + i) * stride);
        square[i] += load_lanes(reinterpret_cast<const Acc<T>*>(start + split * plan.sums_bytes), 1, count);
      }
    transpose(square);
    for (int64_t i = 0; i < count; ++i) store_lanes(target + i * channels + channel, 1, square[i], channels - channel);
  }
}

template <class T>
void reduce_attention(const Attention& args, int64_t begin, int64_t end) {
  const AttentionSizes& s = args.sizes;
  for (int64_t index = begin; index < end;) {
    const int64_t image = index / s.tokens, token = index % s.tokens;
    const int64_t count = minimum(minimum(s.tokens - token, end - index), kLanes<T>);
    const Sums<T> sums(args.sums + image * args.plan.splits * args.plan.sums_bytes, s);
    if (args.needs_key)
      reduce_tokens(sums.dkey + token, sums.stride, args.plan, s.key_channels, count,
                    static_cast<T*>(args.dkey) + index * s.key_channels);
    if (args.needs_value)
      reduce_tokens(sums.dvalue + token, sums.stride, args.plan, s.value_channels, count,
                    static_cast<T*>(args.dvalue) + index * s.value_channels);
    index += count;
  }
}

template <class T>
constexpr AsymmetricAttentionKernels::OfDtype attention_kernels_of = {
    plan_attention<T>, pack_attention<T>, attention_forward<T>, attention_backward<T>, reduce_attention<T>,
};

constexpr AsymmetricAttentionKernels asymmetric_attention_kernels = {{
    attention_kernels_of<float>,
    attention_kernels_of<double>,
    attention_kernels_of<BFloat16>,
    attention_kernels_of<Float16>,
}};

}  // namespace annnet::ANNNET_LEVEL
