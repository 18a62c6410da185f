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
void normalise(Acc<T>* logits, int64_t tokens, int64_t pixels, Acc<T> scale, Acc<T>* logsumexp) {
  if constexpr (kByPixel)
    softmax_by_pixel(logits, tokens, pixels, scale, logsumexp);
  else
    softmax_by_token(logits, tokens, pixels, scale, logsumexp);
}

template <bool kByPixel, class T>
void forward_blocks(const Attention& args, char* memory, int64_t begin, int64_t end) {
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
    for_chunks<kByPixel>(query, s.key_channels, scratch.chunk, [&](int64_t begin, int64_t end, MapRows<T> rows) {
      contract_channels<kByPixel>(begin, end, query.count, s.tokens, packed.key_by_channel, rows, scratch.probabilities,
                                  ahead);
    });
    normalise<kByPixel, T>(scratch.probabilities, s.tokens, query.count, static_cast<Acc<T>>(args.scale),
                           static_cast<Acc<T>*>(args.logsumexp) + block.image * s.pixels + block.pixels.begin);
    if (add) set_pixels(addend, args.addend, s.width, block);
    contract_tokens<kByPixel, T>(args, args.out, s.value_channels, block, packed.value_by_token,
                                 as_operand<T>(scratch.probabilities, s.tokens, query.count, scratch.weights),
                                 add ? &addend : nullptr, ahead);
  }
}

template <bool kByPixel, class T>
void backward_splits(const Attention& args, char* memory, int64_t begin, int64_t end) {
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
      for_chunks<kByPixel>(query, s.key_channels, scratch.chunk, [&](int64_t begin, int64_t end, MapRows<T> rows) {
        contract_channels<kByPixel>(begin, end, query.count, s.tokens, packed.key_by_channel, rows,
                                    scratch.probabilities, ahead);
      });
      normalise<kByPixel, T>(scratch.probabilities, s.tokens, query.count, scale, nullptr);
      const Element<T>* by_pixel = nullptr;
      if (args.needs_value)
        by_pixel = transposed<kByPixel, T>(scratch.probabilities, s.tokens, query.count, scratch.weights_by_pixel);
      for_chunks<kByPixel>(gradient, s.value_channels, scratch.chunk, [&](int64_t begin, int64_t end, MapRows<T> rows) {
        if (args.needs_query || args.needs_key)
          contract_channels<kByPixel>(begin, end, query.count, s.tokens, packed.value_by_channel, rows,
                                      scratch.logit_gradients, ahead);
        if (args.needs_value)
          contract_pixels<kByPixel>(gradient, begin, end, s.tokens, by_pixel, rows, scratch.chunk, sums.dvalue,
                                    number > first, ahead);
      });
      if (!args.needs_query && !args.needs_key) continue;
      if constexpr (kByPixel)
        softmax_gradient_by_pixel(scratch.logit_gradients, scratch.probabilities, s.tokens, query.count, scale);
      else
        softmax_gradient_by_token(scratch.logit_gradients, scratch.probabilities, s.tokens, query.count, scale);
      if (number < last) ahead = ahead_of<T>(args.query, s.key_channels, s.width, block_of<T>(args, number + 1));
      if (args.needs_query)
        contract_tokens<kByPixel, T>(args, args.dquery, s.key_channels, block, packed.key_by_token,
                                     as_operand<T>(scratch.logit_gradients, s.tokens, query.count, scratch.weights),
                                     nullptr, ahead);
      if (args.needs_key) {
        by_pixel = transposed<kByPixel, T>(scratch.logit_gradients, s.tokens, query.count, scratch.weights_by_pixel);
        for_chunks<kByPixel>(query, s.key_channels, scratch.chunk, [&](int64_t begin, int64_t end, MapRows<T> rows) {
          contract_pixels<kByPixel>(query, begin, end, s.tokens, by_pixel, rows, scratch.chunk, sums.dkey,
                                    number > first, ahead);
        });
      }
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
