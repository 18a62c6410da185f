// 2^x of a vector of values that are at most 0, or NaN: what a softmax with its maximum subtracted needs.
#pragma once

#include "vector.h"

namespace annnet::ANNNET_LEVEL {

template <class V>
struct Exp2Constants;

template <>
struct Exp2Constants<FloatVector> {
  using Scalar = float;
  using Integers = IntVector;
  static constexpr float rounder = 0x1.8p23f + 127;  // a sum with it is rounded to an integer n, its low bits n + bias
  static constexpr float smallest = -126;            // below, the result would be subnormal; it is 0
  static constexpr int degree = 7, mantissa_bits = 23;
};

template <>
struct Exp2Constants<DoubleVector> {
  using Scalar = double;
  using Integers = LongVector;
  static constexpr double rounder = 0x1.8p52 + 1023;
  static constexpr double smallest = -1022;
  static constexpr int degree = 13, mantissa_bits = 52;
};

// ln(2)^k / k!
template <class Scalar>
constexpr Scalar exp2_coefficient(int k) {
  double value = 1;
  for (; k > 0; --k) value *= 0x1.62e42fefa39efp-1 / k;
  return static_cast<Scalar>(value);
}

// 2^x = 2^n 2^r with |r| <= 1/2, and 2^r by its Taylor polynomial.
template <class V>
ANNNET_INLINE V exp2_of_negative(V x) {
  using C = Exp2Constants<V>;
  using Scalar = typename C::Scalar;
  const V shifted = x + C::rounder;
  const V r = x - (shifted - C::rounder);
  V result = V{} + exp2_coefficient<Scalar>(C::degree);
#pragma GCC unroll 16
  for (int k = C::degree - 1; k >= 0; --k) result = result * r + exp2_coefficient<Scalar>(k);
  result *= bit_cast<V>(bit_cast<typename C::Integers>(shifted) << C::mantissa_bits);
  return x < C::smallest ? V{} : result;
}

}  // namespace annnet::ANNNET_LEVEL
