// Softmax over tokens and its gradient, in place, a vector of pixels at a time.
#pragma once

#include "pack.h"
#include "vector_exp.h"

namespace annnet::ANNNET_LEVEL {

constexpr int kChains = 4;  // of dependent operations: faster than one, and sums are more accurate

// join(… join(start, term(0)) …, term(tokens - 1)), for a join that may be regrouped and take `start` several times
template <class V, class Term, class Join>
ANNNET_INLINE V join_tokens(int64_t tokens, V start, const Term& term, const Join& join) {
  V chains[kChains] = {start, start, start, start};
  int64_t token = 0;
  for (; token + kChains <= tokens; token += kChains)
    for (int i = 0; i < kChains; ++i) chains[i] = join(chains[i], term(token + i));
  for (; token < tokens; ++token) chains[0] = join(chains[0], term(token));
  return join(join(chains[0], chains[1]), join(chains[2], chains[3]));
}

// Σ_token term(token)
template <class V, class Term>
ANNNET_INLINE V sum_tokens(int64_t tokens, const Term& term) {
  return join_tokens(tokens, V{}, term, [](V a, V b) { return a + b; });
}

// In place: logits[token][pixel] become softmax(scale · logits) over the tokens. `logsumexp` may be null.
template <class A>
void softmax(A* logits, int64_t tokens, int64_t pixels, A scale, A* logsumexp) {
  constexpr int64_t kStride = kBlockStride<A>;
  for (int64_t pixel = 0; pixel < pixels; pixel += kLanes<A>) {
    A* const column = logits + pixel;
    const auto scaled = [&](int64_t token) { return load(column + token * kStride) * scale; };
    const Vec<A> largest = join_tokens(tokens, scaled(0), scaled, [](Vec<A> a, Vec<A> b) { return b > a ? b : a; });
    const Vec<A> sum = sum_tokens<Vec<A>>(tokens, [&](int64_t token) {
      const Vec<A> power = exponential(scaled(token) - largest);
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
