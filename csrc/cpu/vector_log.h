// Natural logarithm of a vector of positive normal values: what a logsumexp needs. Infinity and NaN come back as such.
#pragma once

#include "vector.h"

namespace annnet::ANNNET_LEVEL {

template <class V>
struct LogConstants;

template <>
struct LogConstants<FloatVector> {
  using Scalar = float;
  using Integers = IntVector;
  static constexpr int32_t root_half = 0x3f3504f3;  // √½
  static constexpr int mantissa_bits = 23, terms = 5;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;  // n · ln2_high is exact
};

template <>
struct LogConstants<DoubleVector> {
  using Scalar = double;
  using Integers = LongVector;
  static constexpr int64_t root_half = 0x3fe6a09e667f3bcd;
  static constexpr int mantissa_bits = 52, terms = 12;
  static constexpr double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
};

// x = 2^n m with √½ <= m < √2, and log m = 2 artanh f by its Taylor series, where f = (m - 1) / (m + 1).
template <class V>
ANNNET_INLINE V log_of_normal(V x) {
  using C = LogConstants<V>;
  using Scalar = typename C::Scalar;
  const auto bits = bit_cast<typename C::Integers>(x);
  const auto n = (bits - C::root_half) >> C::mantissa_bits;
  const V m = bit_cast<V>(bits - (n << C::mantissa_bits));
  const V f = (m - 1) / (m + 1), square = f * f;
  V series = V{} + Scalar{1} / (2 * C::terms - 1);
#pragma GCC unroll 16
  for (int k = C::terms - 2; k >= 1; --k) series = series * square + Scalar{1} / (2 * k + 1);
  const V exponent = __builtin_convertvector(n, V);
  const V result = exponent * C::ln2_high + (exponent * C::ln2_low + 2 * (f + f * square * series));
  return x - x == 0 ? result : x;
}

}  // namespace annnet::ANNNET_LEVEL
