// Softmax over tokens and its gradient, in place, a vector of pixels at a time.
#pragma once

#include "pack.h"
#include "vector_exp.h"

namespace annnet::ANNNET_LEVEL {

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

}  // namespace annnet::ANNNET_LEVEL
