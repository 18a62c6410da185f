// exp of a vector of values that are at most 0, or NaN: what a softmax with its maximum subtracted needs.
#pragma once

#include "vector.h"

namespace annnet::ANNNET_LEVEL {

template <class V>
struct ExpConstants;

template <>
struct ExpConstants<FloatVector> {
  using Scalar = float;
  using Integers = IntVector;
  static constexpr float log2e = 0x1.715476p+0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float rounder = 0x1.8p23f;  // added and subtracted, it rounds to an integer
  static constexpr float smallest = -87.33f;   // below, the result would be subnormal; it is 0
  static constexpr int degree = 7, mantissa_bits = 23, bias = 127;
};

template <>
struct ExpConstants<DoubleVector> {
  using Scalar = double;
  using Integers = LongVector;
  static constexpr double log2e = 0x1.71547652b82fep+0, ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
  static constexpr double rounder = 0x1.8p52;
  static constexpr double smallest = -708.39;
  static constexpr int degree = 13, mantissa_bits = 52, bias = 1023;
};

template <class Scalar>
constexpr Scalar inverse_factorial(int k) {
  Scalar factorial = 1;
  for (; k > 1; --k) factorial *= static_cast<Scalar>(k);
  return 1 / factorial;
}

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, and exp(r) by its Taylor polynomial.
template <class V>
ANNNET_INLINE V exponential(V x) {
  using C = ExpConstants<V>;
  using Integers = typename C::Integers;
  const V clamped = x < C::smallest ? V{} + C::smallest : x;
  const V shifted = clamped * C::log2e + C::rounder;
  const V n = shifted - C::rounder;
  const V r = (clamped - n * C::ln2_high) - n * C::ln2_low;
  V result = {};
#pragma GCC unroll 16
  for (int k = C::degree; k >= 0; --k) result = result * r + inverse_factorial<typename C::Scalar>(k);
  const Integers exponent = bit_cast<Integers>(shifted) - bit_cast<Integers>(V{} + C::rounder) + C::bias;
  result *= bit_cast<V>(exponent << C::mantissa_bits);
  return x < C::smallest ? V{} : result;
}

}  // namespace annnet::ANNNET_LEVEL
