// How the attention of one instruction level is cut into pieces and where it keeps what it packs and sums.
#pragma once

#include "asymmetric_attention.h"
#include "pack.h"

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
  const int64_t groups = vectors_of<T>(count);
  const int64_t begin = groups * index / pieces * kLanes<T>, end = groups * (index + 1) / pieces * kLanes<T>;
  return {begin, minimum(end, count)};
}

template <class T>
int64_t blocks_of(int64_t count) {
  return (count + kBlock<T> - 1) / kBlock<T>;
}

template <class T>
constexpr int64_t kBlockStride = leading_dimension<T>(kBlock<T>);

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
  Element<T>* chunk;                       // channels of a map, by channel or by pixel
  Element<T>* weights = nullptr;           // probabilities or logit gradients, by token
  Element<T>* weights_by_pixel;            // backward only
  Acc<T>*probabilities, *logit_gradients;  // the second in the backward only
  char* end;

  Scratch(char* memory, const AttentionSizes& s, bool backward) {
    Arena arena{memory};
    chunk = arena.take<Element<T>>(kChunkElements<T>, 1);
    if (Operand<T>::kStep > 1) weights = arena.take<Element<T>>(operand_rows<T>(s.tokens), kBlockStride<T>);
    const int64_t by_token = round_up(s.tokens, kTileRows) * kBlockStride<T>;
    const int64_t by_pixel = kBlock<T> * leading_dimension<T>(s.tokens);
    const int64_t elements = by_token > by_pixel ? by_token : by_pixel;
    probabilities = arena.take<Acc<T>>(elements, 1);
    if (backward) {
      weights_by_pixel = arena.take<Element<T>>(kBlock<T>, leading_dimension<T>(s.tokens));
      logit_gradients = arena.take<Acc<T>>(elements, 1);
    }
    end = arena.next;
  }
};

// One split's sums; the rows are channels, in whole tiles.
template <class T>
struct Sums {
  int64_t stride;
  Acc<T>*dkey, *dvalue;
  char* end;

  Sums(char* memory, const AttentionSizes& s) : stride(leading_dimension<T>(s.tokens)) {
    Arena arena{memory};
    dkey = arena.take<Acc<T>>(round_up(s.key_channels, kTileRows), stride);
    dvalue = arena.take<Acc<T>>(round_up(s.value_channels, kTileRows), stride);
    end = arena.next;
  }
};

template <class T>
AttentionPlan plan_attention(const AttentionSizes& s, bool backward) {
  // An even number of blocks: of 99, one of two threads would have 2 % more than the other.
  const int64_t enough = blocks_of<T>(s.pixels), blocks = enough > 1 ? round_up(enough, 2) : enough;
  // A split is whole blocks, and its sums cost as much memory traffic as `tokens` pixels.
  int64_t splits = 1;
  while (splits < kMostSplits && splits * s.batch < kBatchedSplits && 2 * splits <= blocks &&
         2 * splits * s.tokens <= s.pixels)
    splits *= 2;
  return {.blocks = blocks,
          .splits = splits,
          .token_blocks = blocks_of<T>(s.tokens),
          .key_groups = vectors_of<T>(s.key_channels),
          .value_groups = vectors_of<T>(s.value_channels),
          .packed_bytes = PackedTokens<T>(nullptr, s, backward).end - static_cast<char*>(nullptr),
          .scratch_bytes = Scratch<T>(nullptr, s, backward).end - static_cast<char*>(nullptr),
          .sums_bytes = Sums<T>(nullptr, s).end - static_cast<char*>(nullptr)};
}

}  // namespace annnet::ANNNET_LEVEL
