// Softmax over tokens and its gradient, in place, of a block of weights: by token or by pixel, see
// attention_products.h.
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

constexpr auto plus = [](auto a, auto b) { return a + b; };
constexpr auto larger = [](auto a, auto b) { return b > a ? b : a; };

// Σ_token term(token)
template <class V, class Term>
ANNNET_INLINE V sum_tokens(int64_t tokens, const Term& term) {
  return join_tokens(tokens, V{}, term, plus);
}

// A scale in two factors: the sign of the logits, and what makes their differences to the largest powers of 2. The
// difference comes first: it is exact where logits are close, and never above 0.
template <class A>
struct Scale {
  A sign, size, base_2;
  explicit Scale(A scale) : sign(scale < 0 ? -1 : 1), size(scale * sign) {
    constexpr double kLog2e = 0x1.71547652b82fep+0;
    base_2 = static_cast<A>(size * kLog2e);
  }
};

template <class A>
void store_logsumexp(A* target, Vec<A> largest, Vec<A> sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    target[i] = largest[i] + static_cast<A>(sizeof(A) == 4 ? logf(sum[i]) : log(sum[i]));
}

// In place: logits[token][pixel] become softmax(scale · logits) over the tokens. `logsumexp` may be null. done(group)
// is called while the weights of a group of pixels, a vector's, are in the first cache.
template <class A, class Done>
void softmax_by_token(A* logits, int64_t tokens, int64_t pixels, A scale, A* logsumexp, const Done& done) {
  constexpr int64_t kStride = kBlockStride<A>;
  const Scale<A> factors(scale);
  for (int64_t pixel = 0; pixel < pixels; pixel += kLanes<A>) {
    A* const column = logits + pixel;
    const auto logit = [&](int64_t token) { return load(column + token * kStride) * factors.sign; };
    const Vec<A> largest = join_tokens(tokens, logit(0), logit, larger);
    const Vec<A> sum = sum_tokens<Vec<A>>(tokens, [&](int64_t token) {
      const Vec<A> power = exp2_of_negative((logit(token) - largest) * factors.base_2);
      store(column + token * kStride, power);
      return power;
    });
    const Vec<A> inverse = 1 / sum;
    for (int64_t token = 0; token < tokens; ++token)
      store(column + token * kStride, load(column + token * kStride) * inverse);
    if (logsumexp != nullptr)
      store_logsumexp(logsumexp + pixel, largest * factors.size, sum, minimum(pixels - pixel, kLanes<A>));
    done(pixel / kLanes<A>);
  }
}

// In place: `gradients` of the probabilities become scale times those of the logits. done(group) as above.
template <class A, class Done>
void softmax_gradient_by_token(A* gradients, const A* probabilities, int64_t tokens, int64_t pixels, A scale,
                               const Done& done) {
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
    done(pixel / kLanes<A>);
  }
}

// A group of as many pixels as a vector has lanes: join(… join(start, part) …) over the parts that row(pixel) gives of
// each pixel, one of `count` to a lane.
template <class A, class Row, class Join>
ANNNET_INLINE Vec<A> join_rows(int64_t count, Vec<A> start, const Row& row, const Join& join) {
  Vec<A> parts[kLanes<A>];
  for (int64_t i = 0; i < kLanes<A>; ++i) parts[i] = i < count ? row(i) : start;
  transpose(parts);
  return join_tokens(kLanes<A>, start, [&](int64_t i) { return parts[i]; }, join);
}

// In place: logits[pixel][token] become softmax(scale · logits) over the tokens. `logsumexp` may be null.
template <class A>
void softmax_by_pixel(A* logits, int64_t tokens, int64_t pixels, A scale, A* logsumexp) {
  constexpr int64_t kWidth = kLanes<A>;
  const int64_t stride = leading_dimension<A>(tokens);
  const Scale<A> factors(scale);
  A beyond[kWidth];  // added to the last vector: minus infinity where there is no token
  for (int64_t lane = 0; lane < kWidth; ++lane)
    beyond[lane] = tokens - (tokens - 1) / kWidth * kWidth > lane ? A{} : -static_cast<A>(INFINITY);
  const auto leave_out = [&](int64_t token, Vec<A> value) {
    return token + kWidth < tokens ? value : value + load(beyond);
  };
  for (int64_t first = 0; first < pixels; first += kWidth) {
    A* const rows = logits + first * stride;
    const int64_t count = minimum(pixels - first, kWidth);
    const auto logit = [&](int64_t i, int64_t token) { return load(rows + i * stride + token) * factors.sign; };
    const auto largest_part = [&](int64_t i) {
      Vec<A> part = leave_out(0, logit(i, 0));
      for (int64_t token = kWidth; token < tokens; token += kWidth)
        part = larger(part, leave_out(token, logit(i, token)));
      return part;
    };
    const Vec<A> largest = join_rows<A>(count, Vec<A>{} - static_cast<A>(INFINITY), largest_part, larger);
    A of_pixel[kWidth];
    store(of_pixel, largest);
    const auto powers = [&](int64_t i) {
      Vec<A> part = {};
      for (int64_t token = 0; token < tokens; token += kWidth) {
        const Vec<A> below = (logit(i, token) - broadcast<A>(of_pixel[i])) * factors.base_2;
        const Vec<A> power = exp2_of_negative(leave_out(token, below));
        store(rows + i * stride + token, power);
        part += power;
      }
      return part;
    };
    const Vec<A> sum = join_rows<A>(count, Vec<A>{}, powers, plus);
    store(of_pixel, 1 / sum);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t token = 0; token < tokens; token += kWidth)
        store(rows + i * stride + token, load(rows + i * stride + token) * of_pixel[i]);
    if (logsumexp != nullptr) store_logsumexp(logsumexp + first, largest * factors.size, sum, count);
  }
}

// In place: `gradients` of the probabilities become scale times those of the logits.
template <class A>
void softmax_gradient_by_pixel(A* gradients, const A* probabilities, int64_t tokens, int64_t pixels, A scale) {
  constexpr int64_t kWidth = kLanes<A>;
  const int64_t stride = leading_dimension<A>(tokens);
  for (int64_t first = 0; first < pixels; first += kWidth) {
    A* const rows = gradients + first * stride;
    const A* const weights = probabilities + first * stride;
    const int64_t count = minimum(pixels - first, kWidth);
    const auto products = [&](int64_t i) {
      Vec<A> part = {};
      for (int64_t token = 0; token < tokens; token += kWidth)
        part += load(weights + i * stride + token) * load(rows + i * stride + token);
      return part;
    };
    A mean[kWidth];
    store(mean, join_rows<A>(count, Vec<A>{}, products, plus));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t token = 0; token < tokens; token += kWidth) {
        A* const place = rows + i * stride + token;
        store(place, load(weights + i * stride + token) * (load(place) - mean[i]) * scale);
      }
  }
}

}  // namespace annnet::ANNNET_LEVEL
