// Asymmetric attention, forward and backward, one block of pixels at a time: the block's logits, probabilities and
// packed channels stay in the second cache, and every product is matrix_tile.h's.
#pragma once

#include "asymmetric_attention.h"
#include "pack.h"
#include "vector_exp.h"

namespace annnet::ANNNET_LEVEL {

// Channels packed at a time: with a block of pixels, 56 KiB.
constexpr int64_t kChunk = 128;

constexpr int64_t kBatchedSplits = 64, kMostSplits = 16;

struct Range {
  int64_t begin, end;
};

// Piece `index` of `pieces` nearly equal ones; all begin at whole vectors.
template <class T>
Range piece(int64_t count, int64_t pieces, int64_t index) {
  const int64_t groups = (count + kLanes<T> - 1) / kLanes<T>;
  const int64_t begin = groups * index / pieces * kLanes<T>, end = groups * (index + 1) / pieces * kLanes<T>;
  return {begin, minimum(end, count)};
}

template <class T>
int64_t blocks_of(int64_t count) {
  return (count + kBlock<T> - 1) / kBlock<T>;
}

template <class T>
constexpr int64_t kBlockStride = leading_dimension<T>(kBlock<T>);

// ---- memory ----

// Takes arrays from a piece of memory one after the other; from null, it measures.
struct Arena {
  char* next;
  template <class E>
  E* take(int64_t rows, int64_t stride) {
    E* const taken = reinterpret_cast<E*>(next);
    next += round_up(rows * stride * static_cast<int64_t>(sizeof(E)), 64);
    return taken;
  }
};

template <class T>
int64_t operand_rows(int64_t depth) {
  return (depth + Operand<T>::kStep - 1) / Operand<T>::kStep;
}

// The packed tokens of one image, by what the rows (k) of the operand are.
template <class T>
struct PackedTokens {
  int64_t token_stride, key_stride, value_stride;
  Element<T>*key_by_channel, *key_by_token = nullptr, *value_by_channel = nullptr, *value_by_token = nullptr;
  char* end;

  PackedTokens(char* memory, const AttentionSizes& s, bool backward)
      : token_stride(leading_dimension<T>(s.tokens)),
        key_stride(leading_dimension<T>(s.key_channels)),
        value_stride(leading_dimension<T>(s.value_channels)) {
    Arena arena{memory};
    key_by_channel = arena.take<Element<T>>(operand_rows<T>(s.key_channels), token_stride);
    if (backward) {
      key_by_token = arena.take<Element<T>>(operand_rows<T>(s.tokens), key_stride);
      value_by_channel = arena.take<Element<T>>(operand_rows<T>(s.value_channels), token_stride);
    } else {
      value_by_token = arena.take<Element<T>>(operand_rows<T>(s.tokens), value_stride);
    }
    end = arena.next;
  }
};

// A chunk by channel or by pixel, whichever is larger.
template <class T>
constexpr int64_t kChunkElements = kChunk * kBlockStride<T> > kBlock<T>* leading_dimension<T>(kChunk)
                                       ? kChunk * kBlockStride<T>
                                       : kBlock<T> * leading_dimension<T>(kChunk);

template <class T>
struct Scratch {
  Element<T>* chunk;              // channels of a map, by channel or by pixel
  Element<T>* weights = nullptr;  // probabilities or logit gradients, by token
  Element<T>* weights_by_pixel;   // backward only, as the next one
  Acc<T>*probabilities, *logit_gradients;
  char* end;

  Scratch(char* memory, const AttentionSizes& s, bool backward) {
    Arena arena{memory};
    chunk = arena.take<Element<T>>(kChunkElements<T>, 1);
    if (Operand<T>::kStep > 1) weights = arena.take<Element<T>>(operand_rows<T>(s.tokens), kBlockStride<T>);
    const int64_t rows = round_up(s.tokens, kTileRows);
    probabilities = arena.take<Acc<T>>(rows, kBlockStride<T>);
    if (backward) {
      weights_by_pixel = arena.take<Element<T>>(kBlock<T>, leading_dimension<T>(s.tokens));
      logit_gradients = arena.take<Acc<T>>(rows, kBlockStride<T>);
    }
    end = arena.next;
  }
};

// One split's sums; the rows are tokens.
template <class T>
struct Sums {
  int64_t key_stride, value_stride;
  Acc<T>*dkey, *dvalue;
  char* end;

  Sums(char* memory, const AttentionSizes& s)
      : key_stride(leading_dimension<T>(s.key_channels)), value_stride(leading_dimension<T>(s.value_channels)) {
    Arena arena{memory};
    dkey = arena.take<Acc<T>>(round_up(s.tokens, kTileRows), key_stride);
    dvalue = arena.take<Acc<T>>(round_up(s.tokens, kTileRows), value_stride);
    end = arena.next;
  }
};

template <class T>
AttentionPlan plan_attention(const AttentionSizes& s, bool backward) {
  // A split's sums cost as much memory traffic as `tokens` pixels; and no split may be empty.
  const int64_t fewest_pixels = s.tokens > kLanes<T> ? s.tokens : kLanes<T>;
  int64_t splits = 1;
  while (splits < kMostSplits && splits * s.batch < kBatchedSplits && 2 * splits * fewest_pixels <= s.pixels)
    splits *= 2;
  return {.blocks = blocks_of<T>(s.pixels),
          .splits = splits,
          .token_blocks = blocks_of<T>(s.tokens),
          .packed_bytes = PackedTokens<T>(nullptr, s, backward).end - static_cast<char*>(nullptr),
          .scratch_bytes = Scratch<T>(nullptr, s, backward).end - static_cast<char*>(nullptr),
          .sums_bytes = Sums<T>(nullptr, s).end - static_cast<char*>(nullptr)};
}

// ---- where the elements are ----

template <class T>
void set_pixels(Positions<T>& positions, const Map& map, int64_t width, int64_t image, Range pixels) {
  positions.data = static_cast<const T*>(map.data) + image * map.batch_stride;
  positions.channel_stride = map.channel_stride;
  positions.count = 0;
  for (int64_t pixel = pixels.begin; pixel < pixels.end;) {
    const int64_t row = pixel / width, column = pixel % width;
    const int64_t length = minimum(width - column, pixels.end - pixel);
    positions.append(row * map.row_stride + column * map.column_stride, map.column_stride, length);
    pixel += length;
  }
  positions.find_adjacent();
}

template <class T>
void set_tokens(Positions<T>& positions, const Tokens& tokens, int64_t image, Range range) {
  positions.data = static_cast<const T*>(tokens.data) + image * tokens.batch_stride;
  positions.channel_stride = tokens.channel_stride;
  positions.count = 0;
  positions.append(range.begin * tokens.token_stride, tokens.token_stride, range.end - range.begin);
  positions.find_adjacent();
}

// A buffer of one row per token and one column per pixel of a block.
template <class A>
void set_buffer(Positions<A>& positions, const A* buffer, int64_t pixels) {
  set_tokens(positions, {buffer, 0, kBlockStride<A>, 1}, 0, {0, pixels});
}

// ---- the three products ----

// result[token][pixel] = Σ_channel tokens[channel][token] map[channel][pixel]
template <class T>
void contract_channels(const Positions<T>& map, int64_t channels, int64_t tokens, const Element<T>* by_channel,
                       Element<T>* chunk, Acc<T>* result) {
  const int64_t stride = leading_dimension<T>(tokens);
  for (int64_t begin = 0; begin < channels; begin += kChunk) {
    const int64_t end = minimum(begin + kChunk, channels);
    pack_channels<T>(map, begin, end, chunk, kBlockStride<T>);
    const Element<T>* a = by_channel + begin / Operand<T>::kStep * stride;
    if (begin == 0)
      multiply<T>(tokens, map.count, end - begin, a, stride, chunk, kBlockStride<T>,
                  ToBuffer<T, false>{result, kBlockStride<T>});
    else
      multiply<T>(tokens, map.count, end - begin, a, stride, chunk, kBlockStride<T>,
                  ToBuffer<T, true>{result, kBlockStride<T>});
  }
}

// map[channel][pixel] = Σ_token tokens[token][channel] weights[token][pixel], written to a dense map.
template <class T>
void contract_tokens(const Attention& args, void* map, int64_t channels, int64_t image, Range pixels,
                     const Element<T>* by_token, const Element<T>* weights) {
  const AttentionSizes& s = args.sizes;
  const int64_t stride = leading_dimension<T>(channels), count = pixels.end - pixels.begin;
  T* const target = static_cast<T*>(map) + image * s.pixels * channels;
  if (args.channels_last)
    multiply<T>(count, channels, s.tokens, weights, kBlockStride<T>, by_token, stride,
                ToTensor<T>{target + pixels.begin * channels, channels, count, channels});
  else
    multiply<T>(channels, count, s.tokens, by_token, stride, weights, kBlockStride<T>,
                ToTensor<T>{target + pixels.begin, s.pixels, channels, count});
}

// sums[token][channel] (+)= Σ_pixel weights[pixel][token] map[channel][pixel]
template <class T>
void contract_pixels(const Positions<T>& map, int64_t channels, int64_t tokens, const Element<T>* weights_by_pixel,
                     Element<T>* chunk, Acc<T>* sums, bool add) {
  const int64_t stride = leading_dimension<T>(tokens), sums_stride = leading_dimension<T>(channels);
  for (int64_t begin = 0; begin < channels; begin += kChunk) {
    const int64_t end = minimum(begin + kChunk, channels), chunk_stride = leading_dimension<T>(end - begin);
    pack_positions<T>(map, begin, end, chunk, chunk_stride);
    if (add)
      multiply<T>(tokens, end - begin, map.count, weights_by_pixel, stride, chunk, chunk_stride,
                  ToBuffer<T, true>{sums + begin, sums_stride});
    else
      multiply<T>(tokens, end - begin, map.count, weights_by_pixel, stride, chunk, chunk_stride,
                  ToBuffer<T, false>{sums + begin, sums_stride});
  }
}

// ---- softmax, a vector of pixels at a time ----

constexpr int kChains = 4;  // sums run in as many chains: faster, and more accurate than one

// Σ_token term(token)
template <class V, class Term>
ANNNET_INLINE V sum_tokens(int64_t tokens, const Term& term) {
  V sums[kChains] = {};
  int64_t token = 0;
  for (; token + kChains <= tokens; token += kChains)
    for (int i = 0; i < kChains; ++i) sums[i] += term(token + i);
  for (; token < tokens; ++token) sums[0] += term(token);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// In place: logits[token][pixel] become softmax(scale · logits) over the tokens. `logsumexp` may be null.
template <class A>
void softmax(A* logits, int64_t tokens, int64_t pixels, A scale, A* logsumexp) {
  constexpr int64_t kStride = kBlockStride<A>;
  for (int64_t pixel = 0; pixel < pixels; pixel += kLanes<A>) {
    A* const column = logits + pixel;
    Vec<A> largest = load(column) * scale;
    for (int64_t token = 0; token < tokens; ++token) {
      const Vec<A> logit = load(column + token * kStride) * scale;
      store(column + token * kStride, logit);
      largest = logit > largest ? logit : largest;
    }
    const Vec<A> sum = sum_tokens<Vec<A>>(tokens, [&](int64_t token) {
      const Vec<A> power = exponential(load(column + token * kStride) - largest);
      store(column + token * kStride, power);
      return power;
    });
    const Vec<A> factor = 1 / sum;
    for (int64_t token = 0; token < tokens; ++token)
      store(column + token * kStride, load(column + token * kStride) * factor);
    if (logsumexp != nullptr)
      for (int64_t i = 0; i < minimum(pixels - pixel, kLanes<A>); ++i)
        logsumexp[pixel + i] = largest[i] + static_cast<A>(sizeof(A) == 4 ? logf(sum[i]) : log(sum[i]));
  }
}

// In place: `gradients` of the probabilities become scale times those of the logits.
template <class A>
void softmax_gradient(A* gradients, const A* probabilities, int64_t tokens, int64_t pixels, A scale) {
  constexpr int64_t kStride = kBlockStride<A>;
  for (int64_t pixel = 0; pixel < pixels; pixel += kLanes<A>) {
    A* const gradient = gradients + pixel;
    const A* const probability = probabilities + pixel;
    const Vec<A> mean = sum_tokens<Vec<A>>(
        tokens, [&](int64_t token) { return load(probability + token * kStride) * load(gradient + token * kStride); });
    for (int64_t token = 0; token < tokens; ++token) {
      A* const place = gradient + token * kStride;
      store(place, load(probability + token * kStride) * (load(place) - mean) * scale);
    }
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
  Positions<T> query;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / args.plan.blocks;
    const Range pixels = piece<T>(s.pixels, args.plan.blocks, index % args.plan.blocks);
    const PackedTokens<T> packed(args.packed + image * args.plan.packed_bytes, s, false);
    set_pixels(query, args.query, s.width, image, pixels);
    contract_channels(query, s.key_channels, s.tokens, packed.key_by_channel, scratch.chunk, scratch.probabilities);
    softmax(scratch.probabilities, s.tokens, query.count, static_cast<Acc<T>>(args.scale),
            static_cast<Acc<T>*>(args.logsumexp) + image * s.pixels + pixels.begin);
    contract_tokens<T>(args, args.out, s.value_channels, image, pixels, packed.value_by_token,
                       as_operand<T>(scratch.probabilities, s.tokens, query.count, scratch.weights));
  }
}

template <class T>
void attention_backward(const Attention& args, char* memory, int64_t begin, int64_t end) {
  const AttentionSizes& s = args.sizes;
  const Scratch<T> scratch(memory, s, true);
  const Acc<T> scale = static_cast<Acc<T>>(args.scale);
  Positions<T> query, gradient;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / args.plan.splits;
    const PackedTokens<T> packed(args.packed + image * args.plan.packed_bytes, s, true);
    const Sums<T> sums(args.sums + index * args.plan.sums_bytes, s);
    const Range split = piece<T>(s.pixels, args.plan.splits, index % args.plan.splits);
    const int64_t blocks = blocks_of<T>(split.end - split.begin);
    for (int64_t block = 0; block < blocks; ++block) {
      Range pixels = piece<T>(split.end - split.begin, blocks, block);
      pixels = {split.begin + pixels.begin, split.begin + pixels.end};
      set_pixels(query, args.query, s.width, image, pixels);
      set_pixels(gradient, args.grad_out, s.width, image, pixels);
      contract_channels(query, s.key_channels, s.tokens, packed.key_by_channel, scratch.chunk, scratch.probabilities);
      softmax<Acc<T>>(scratch.probabilities, s.tokens, query.count, scale, nullptr);
      if (args.needs_value) {
        transpose_weights<T>(scratch.probabilities, s.tokens, query.count, scratch.weights_by_pixel);
        contract_pixels(gradient, s.value_channels, s.tokens, scratch.weights_by_pixel, scratch.chunk, sums.dvalue,
                        block > 0);
      }
      if (!args.needs_query && !args.needs_key) continue;
      contract_channels(gradient, s.value_channels, s.tokens, packed.value_by_channel, scratch.chunk,
                        scratch.logit_gradients);
      softmax_gradient(scratch.logit_gradients, scratch.probabilities, s.tokens, query.count, scale);
      if (args.needs_query)
        contract_tokens<T>(args, args.dquery, s.key_channels, image, pixels, packed.key_by_token,
                           as_operand<T>(scratch.logit_gradients, s.tokens, query.count, scratch.weights));
      if (args.needs_key) {
        transpose_weights<T>(scratch.logit_gradients, s.tokens, query.count, scratch.weights_by_pixel);
        contract_pixels(query, s.key_channels, s.tokens, scratch.weights_by_pixel, scratch.chunk, sums.dkey, block > 0);
      }
    }
  }
}

// One row of `channels` elements: the splits' rows, summed in their order.
template <class T>
void reduce_row(const char* sums, int64_t splits, int64_t bytes, int64_t channels, T* target) {
  for (int64_t channel = 0; channel < channels; channel += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t split = 0; split < splits; ++split)
      sum += load(reinterpret_cast<const Acc<T>*>(sums + split * bytes) + channel);
    ToTensor<T>{target, 0, 1, channels}(0, channel, sum);
  }
}

template <class T>
void reduce_attention(const Attention& args, int64_t begin, int64_t end) {
  const AttentionSizes& s = args.sizes;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / s.tokens, token = index % s.tokens, splits = args.plan.splits;
    const Sums<T> sums(args.sums + image * splits * args.plan.sums_bytes, s);
    if (args.needs_key)
      reduce_row(reinterpret_cast<const char*>(sums.dkey + token * sums.key_stride), splits, args.plan.sums_bytes,
                 s.key_channels, static_cast<T*>(args.dkey) + index * s.key_channels);
    if (args.needs_value)
      reduce_row(reinterpret_cast<const char*>(sums.dvalue + token * sums.value_stride), splits, args.plan.sums_bytes,
                 s.value_channels, static_cast<T*>(args.dvalue) + index * s.value_channels);
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
