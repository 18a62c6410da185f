// Asymmetric attention, forward and backward, one block of pixels at a time.
#pragma once

#include "attention_products.h"
#include "softmax.h"

namespace annnet::ANNNET_LEVEL {

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

// Σ over the tokens is 1 afterwards, for every pixel.
template <bool kByPixel, class T>
void normalise(Acc<T>* logits, int64_t tokens, int64_t pixels, Acc<T> scale, Acc<T>* logsumexp,
               const PixelRows<kByPixel, T>& rows) {
  if constexpr (kByPixel)
    softmax_by_pixel(logits, tokens, pixels, scale, logsumexp);
  else
    softmax_by_token(logits, tokens, pixels, scale, logsumexp, rows);
}

template <bool kByPixel, class T>
void forward_blocks(const Attention& args, char* memory, int64_t begin, int64_t end) {
  const AttentionSizes& s = args.sizes;
  const Scratch<T> scratch(memory, s, false);
  const Acc<T> scale = static_cast<Acc<T>>(args.scale);
  const bool skips = args.skip.data != nullptr;
  Positions<T> query, skip;
  if (args.norm.data != nullptr) query.norm = &args.norm;
  for (int64_t index = begin; index < end; ++index) {
    const Block block = block_of<T>(args, index);
    const PackedTokens<T> packed(args.packed + block.image * args.plan.packed_bytes, s, false);
    ReadAhead ahead =
        index + 1 < end ? ahead_of<T>(args.query, s.key_channels, s.width, block_of<T>(args, index + 1)) : ReadAhead{};
    set_pixels(query, args.query, s.width, block);
    for_chunks<kByPixel>(query, s.key_channels, scratch.chunk, [&](int64_t begin, int64_t end, MapRows<T> rows) {
      contract_channels<kByPixel>(begin, end, query.count, s.tokens, packed.key_by_channel, rows, scratch.probabilities,
                                  ahead);
    });
    Acc<T>* const logsumexp = static_cast<Acc<T>*>(args.logsumexp) + block.image * s.pixels + block.pixels.begin;
    normalise<kByPixel, T>(scratch.probabilities, s.tokens, query.count, scale, logsumexp, {});
    if (skips) set_pixels(skip, args.skip, s.width, block);
    const Addends<T> addends = {skips ? &skip : nullptr, static_cast<const Acc<T>*>(args.constant)};
    contract_tokens<kByPixel, T>(args, args.out, s.value_channels, block, packed.value_by_token,
                                 as_operand<T>(scratch.probabilities, s.tokens, query.count, scratch.weights), addends,
                                 ahead);
  }
}

template <bool kByPixel, class T>
void backward_splits(const Attention& args, char* memory, int64_t begin, int64_t end) {
  const AttentionSizes& s = args.sizes;
  const Scratch<T> scratch(memory, s, true);
  const Acc<T> scale = static_cast<Acc<T>>(args.scale);
  Positions<T> query, gradient;
  if (args.norm.data != nullptr) query.norm = &args.norm;
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
      for_chunks<kByPixel>(query, s.key_channels, scratch.chunk, [&](int64_t begin, int64_t end, MapRows<T> rows) {
        contract_channels<kByPixel>(begin, end, query.count, s.tokens, packed.key_by_channel, rows,
                                    scratch.probabilities, ahead);
      });
      const PixelRows<kByPixel, T> probability_rows(scratch.probabilities, s.tokens, query.count,
                                                    args.needs_value ? scratch.weights_by_pixel : nullptr);
      normalise<kByPixel, T>(scratch.probabilities, s.tokens, query.count, scale, nullptr, probability_rows);
      for_chunks<kByPixel>(gradient, s.value_channels, scratch.chunk, [&](int64_t begin, int64_t end, MapRows<T> rows) {
        if (args.needs_query || args.needs_key)
          contract_channels<kByPixel>(begin, end, query.count, s.tokens, packed.value_by_channel, rows,
                                      scratch.logit_gradients, ahead);
        if (args.needs_value)
          contract_pixels<kByPixel>(gradient, begin, end, s.tokens, probability_rows.data(), rows, scratch.chunk,
                                    sums.dvalue, number > first, ahead);
      });
      if (!args.needs_query && !args.needs_key) continue;
      const PixelRows<kByPixel, T> gradient_rows(scratch.logit_gradients, s.tokens, query.count,
                                                 args.needs_key ? scratch.weights_by_pixel : nullptr);
      if constexpr (kByPixel)
        softmax_gradient_by_pixel(scratch.logit_gradients, scratch.probabilities, s.tokens, query.count, scale);
      else
        softmax_gradient_by_token(scratch.logit_gradients, scratch.probabilities, s.tokens, query.count, scale,
                                  gradient_rows);
      if (number < last) ahead = ahead_of<T>(args.query, s.key_channels, s.width, block_of<T>(args, number + 1));
      if (args.needs_key)  // before the query's own gradient, while the query is near
        for_chunks<kByPixel>(query, s.key_channels, scratch.chunk, [&](int64_t begin, int64_t end, MapRows<T> rows) {
          contract_pixels<kByPixel>(query, begin, end, s.tokens, gradient_rows.data(), rows, scratch.chunk, sums.dkey,
                                    number > first, ahead);
        });
      if (args.needs_query)
        contract_tokens<kByPixel, T>(args, args.dquery, s.key_channels, block, packed.key_by_token,
                                     as_operand<T>(scratch.logit_gradients, s.tokens, query.count, scratch.weights), {},
                                     ahead);
    }
  }
}

template <class T>
void attention_forward(const Attention& args, char* scratch, int64_t begin, int64_t end) {
  if constexpr (Operand<T>::kStep == 1)
    if (args.channels_last) return forward_blocks<true, T>(args, scratch, begin, end);
  forward_blocks<false, T>(args, scratch, begin, end);
}

template <class T>
void attention_backward(const Attention& args, char* scratch, int64_t begin, int64_t end) {
  if constexpr (Operand<T>::kStep == 1)
    if (args.channels_last) return backward_splits<true, T>(args, scratch, begin, end);
  backward_splits<false, T>(args, scratch, begin, end);
}

// target[token][channel] = Σ sums[channel][token] of the splits, in their order, for at most a vector of channels from
// `channel` on. Eight vectors of a row of sums are read at a time (110 tokens are seven with AVX-512): one of each row,
// a line here and there, took twice as long.
template <class T>
void reduce_channels(const Acc<T>* sums, int64_t stride, const AttentionPlan& plan, int64_t tokens, int64_t channel,
                     int64_t channels, T* target) {
  constexpr int64_t kWidth = kLanes<T>, kVectors = 8;
  const int64_t rows = minimum(channels - channel, kWidth);
  for (int64_t begin = 0; begin < tokens; begin += kVectors * kWidth) {
    const int64_t vectors = minimum(vectors_of<T>(tokens - begin), kVectors);
    Vec<T> squares[kVectors][kWidth] = {};
    for (int64_t split = 0; split < plan.splits; ++split)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t v = 0; v < vectors; ++v) {
          const Acc<T>* const first = sums + (channel + row) * stride + begin + v * kWidth;
          const char* const place = reinterpret_cast<const char*>(first) + split * plan.sums_bytes;
          __builtin_prefetch(place + plan.sums_bytes, 0, 3);
          squares[v][row] += load(reinterpret_cast<const Acc<T>*>(place));
        }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t token = begin + v * kWidth;
      transpose(squares[v]);
      for (int64_t i = 0; i < minimum(tokens - token, kWidth); ++i)
        store_lanes(target + (token + i) * channels + channel, 1, squares[v][i], rows);
    }
  }
}

template <class T>
void reduce_attention(const Attention& args, int64_t begin, int64_t end) {
  const AttentionSizes& s = args.sizes;
  const int64_t key_groups = args.needs_key ? args.plan.key_groups : 0;
  const int64_t groups = key_groups + (args.needs_value ? args.plan.value_groups : 0);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / groups, group = index % groups;
    const Sums<T> sums(args.sums + image * args.plan.splits * args.plan.sums_bytes, s);
    const auto reduce = [&](const Acc<T>* part, int64_t group, int64_t channels, void* target) {
      reduce_channels(part, sums.stride, args.plan, s.tokens, group * kLanes<T>, channels,
                      static_cast<T*>(target) + image * s.tokens * channels);
    };
    if (group < key_groups)
      reduce(sums.dkey, group, s.key_channels, args.dkey);
    else
      reduce(sums.dvalue, group - key_groups, s.value_channels, args.dvalue);
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
