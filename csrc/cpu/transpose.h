// In-register transposition of a square of vectors: log2(lanes) rounds of interleaving the upper with the lower half.
#pragma once

#include "vector.h"

namespace annnet::ANNNET_LEVEL {

// __builtin_shufflevector came to GCC with version 12.
#if defined(__clang__) || __GNUC__ >= 12
#define ANNNET_SHUFFLE(a, b, mask_type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ANNNET_SHUFFLE(a, b, mask_type, ...) __builtin_shuffle(a, b, mask_type{__VA_ARGS__})
#endif

ANNNET_INLINE void interleave(FloatVector a, FloatVector b, FloatVector& low, FloatVector& high) {
#if ANNNET_VECTOR_BYTES == 64
  low = ANNNET_SHUFFLE(a, b, IntVector, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = ANNNET_SHUFFLE(a, b, IntVector, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif ANNNET_VECTOR_BYTES == 32
  low = ANNNET_SHUFFLE(a, b, IntVector, 0, 8, 1, 9, 2, 10, 3, 11);
  high = ANNNET_SHUFFLE(a, b, IntVector, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = ANNNET_SHUFFLE(a, b, IntVector, 0, 4, 1, 5);
  high = ANNNET_SHUFFLE(a, b, IntVector, 2, 6, 3, 7);
#endif
}

ANNNET_INLINE void interleave(DoubleVector a, DoubleVector b, DoubleVector& low, DoubleVector& high) {
#if ANNNET_VECTOR_BYTES == 64
  low = ANNNET_SHUFFLE(a, b, LongVector, 0, 8, 1, 9, 2, 10, 3, 11);
  high = ANNNET_SHUFFLE(a, b, LongVector, 4, 12, 5, 13, 6, 14, 7, 15);
#elif ANNNET_VECTOR_BYTES == 32
  low = ANNNET_SHUFFLE(a, b, LongVector, 0, 4, 1, 5);
  high = ANNNET_SHUFFLE(a, b, LongVector, 2, 6, 3, 7);
#else
  low = ANNNET_SHUFFLE(a, b, LongVector, 0, 2);
  high = ANNNET_SHUFFLE(a, b, LongVector, 1, 3);
#endif
}

// rows[i][j] becomes rows[j][i].
template <class V>
ANNNET_INLINE void transpose(V* rows) {
  constexpr int kSize = sizeof(V) / sizeof(V{}[0]);
  V other[kSize];
  V* from = rows;
  V* to = other;
#pragma GCC unroll 4
  for (int round = 1; round < kSize; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kSize / 2; ++i) interleave(from[i], from[i + kSize / 2], to[2 * i], to[2 * i + 1]);
    V* const swapped = from;
    from = to;
    to = swapped;
  }
  if (from != rows) {
    for (int i = 0; i < kSize; ++i) rows[i] = from[i];
  }
}

}  // namespace annnet::ANNNET_LEVEL
