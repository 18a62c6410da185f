// In-register transposition of a square of vectors: within lanes of 16 bytes, then of whole lanes. Shuffles that stay
// within lanes, or move whole ones, need no register for their indices.
#pragma once

#include "vector.h"

namespace annnet::ANNNET_LEVEL {

// __builtin_shufflevector came to GCC with version 12.
#if defined(__clang__) || __GNUC__ >= 12
#define ANNNET_SHUFFLE(a, b, mask_type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ANNNET_SHUFFLE(a, b, mask_type, ...) __builtin_shuffle(a, b, mask_type{__VA_ARGS__})
#endif

// Interleaves the lower, or the upper, elements of every lane.
ANNNET_INLINE void interleave(FloatVector a, FloatVector b, FloatVector& low, FloatVector& high) {
#if ANNNET_VECTOR_BYTES == 64
  low = ANNNET_SHUFFLE(a, b, IntVector, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  high = ANNNET_SHUFFLE(a, b, IntVector, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif ANNNET_VECTOR_BYTES == 32
  low = ANNNET_SHUFFLE(a, b, IntVector, 0, 8, 1, 9, 4, 12, 5, 13);
  high = ANNNET_SHUFFLE(a, b, IntVector, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  low = ANNNET_SHUFFLE(a, b, IntVector, 0, 4, 1, 5);
  high = ANNNET_SHUFFLE(a, b, IntVector, 2, 6, 3, 7);
#endif
}

ANNNET_INLINE void interleave(DoubleVector a, DoubleVector b, DoubleVector& low, DoubleVector& high) {
#if ANNNET_VECTOR_BYTES == 64
  low = ANNNET_SHUFFLE(a, b, LongVector, 0, 8, 2, 10, 4, 12, 6, 14);
  high = ANNNET_SHUFFLE(a, b, LongVector, 1, 9, 3, 11, 5, 13, 7, 15);
#elif ANNNET_VECTOR_BYTES == 32
  low = ANNNET_SHUFFLE(a, b, LongVector, 0, 4, 2, 6);
  high = ANNNET_SHUFFLE(a, b, LongVector, 1, 5, 3, 7);
#else
  low = ANNNET_SHUFFLE(a, b, LongVector, 0, 2);
  high = ANNNET_SHUFFLE(a, b, LongVector, 1, 3);
#endif
}

// The lanes of even number of a and then of b, and those of odd number. A vector of 16 bytes is one lane.
ANNNET_INLINE void split_lanes([[maybe_unused]] DoubleVector a, [[maybe_unused]] DoubleVector b,
                               [[maybe_unused]] DoubleVector& even, [[maybe_unused]] DoubleVector& odd) {
#if ANNNET_VECTOR_BYTES == 64
  even = ANNNET_SHUFFLE(a, b, LongVector, 0, 1, 4, 5, 8, 9, 12, 13);
  odd = ANNNET_SHUFFLE(a, b, LongVector, 2, 3, 6, 7, 10, 11, 14, 15);
#elif ANNNET_VECTOR_BYTES == 32
  even = ANNNET_SHUFFLE(a, b, LongVector, 0, 1, 4, 5);
  odd = ANNNET_SHUFFLE(a, b, LongVector, 2, 3, 6, 7);
#endif
}

// As many rows as a lane has elements: element k of each lane of row i becomes element i of that lane of row k.
ANNNET_INLINE void transpose_within_lanes(const DoubleVector* from, DoubleVector* to) {
  interleave(from[0], from[1], to[0], to[1]);
}

ANNNET_INLINE void transpose_within_lanes(const FloatVector* from, DoubleVector* to) {
  FloatVector pairs[4];
  for (int i = 0; i < 4; i += 2) interleave(from[i], from[i + 1], pairs[i], pairs[i + 1]);
  for (int i = 0; i < 2; ++i)
    interleave(bit_cast<DoubleVector>(pairs[i]), bit_cast<DoubleVector>(pairs[i + 2]), to[2 * i], to[2 * i + 1]);
}

// rows[i][j] becomes rows[j][i].
template <class V>
ANNNET_INLINE void transpose(V* rows) {
  constexpr int kSize = sizeof(V) / sizeof(V{}[0]), kLane = 16 / sizeof(V{}[0]);
  DoubleVector wide[kSize];
#pragma GCC unroll 8
  for (int i = 0; i < kSize; i += kLane) transpose_within_lanes(rows + i, wide + i);
#pragma GCC unroll 2
  for (int round = kLane; round < kSize; round *= 2) {
    DoubleVector split[kSize];
#pragma GCC unroll 8
    for (int i = 0; i < kSize / 2; ++i) {
      const int first = i / kLane * 2 * kLane + i % kLane;
      split_lanes(wide[first], wide[first + kLane], split[i], split[i + kSize / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) wide[i] = split[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSize; ++i) rows[i] = bit_cast<V>(wide[i]);
}

}  // namespace annnet::ANNNET_LEVEL
