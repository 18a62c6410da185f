// Vectors of one instruction level (GCC and Clang vector extensions, ANNNET_VECTOR_BYTES wide), and loads and stores
// that convert 16-bit elements to float32 and back. `+ - * /`, comparisons and `mask ? a : b` work on vectors as they
// stand. Only C headers may be included here: see levels.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace annnet::ANNNET_LEVEL {

#define ANNNET_INLINE inline __attribute__((always_inline))

constexpr int kVectorBytes = ANNNET_VECTOR_BYTES;

using FloatVector = float __attribute__((vector_size(kVectorBytes)));
using DoubleVector = double __attribute__((vector_size(kVectorBytes)));
using IntVector = int32_t __attribute__((vector_size(kVectorBytes)));
using UnsignedVector = uint32_t __attribute__((vector_size(kVectorBytes)));
using LongVector = int64_t __attribute__((vector_size(kVectorBytes)));
using HalfBitsVector = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which elements of type T are summed, its vector, and the number of lanes.
template <class T>
struct Accumulator {
  using type = float;
  using vector = FloatVector;
};
template <>
struct Accumulator<double> {
  using type = double;
  using vector = DoubleVector;
};
template <class T>
using Acc = typename Accumulator<T>::type;
template <class T>
using Vec = typename Accumulator<T>::vector;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc<T>));

template <class T>
ANNNET_INLINE Vec<T> broadcast(Acc<T> value) {
  return value - Vec<T>{};  // not `Vec<T>{} + value`, which would turn -0 into 0
}

template <class To, class From>
ANNNET_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

// ---- 16-bit conversions; to 16 bits they round to nearest even, keep infinities, and make NaN a quiet NaN ----

ANNNET_INLINE FloatVector widen(HalfBitsVector bits, BFloat16) {
  return bit_cast<FloatVector>(__builtin_convertvector(bits, UnsignedVector) << 16);
}

ANNNET_INLINE HalfBitsVector narrow(FloatVector value, BFloat16) {
  const UnsignedVector bits = bit_cast<UnsignedVector>(value);
  const UnsignedVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UnsignedVector nan = (bits >> 16) | 0x0040u;
  return __builtin_convertvector(value == value ? rounded : nan, HalfBitsVector);
}

ANNNET_INLINE FloatVector widen(HalfBitsVector bits, Float16) {
#if ANNNET_VECTOR_BYTES == 64
  return _mm512_cvtph_ps(bit_cast<__m256i>(bits));
#elif ANNNET_VECTOR_BYTES == 32
  return _mm256_cvtph_ps(bit_cast<__m128i>(bits));
#else
  // The exponent is moved up by 112; infinities and NaN need 112 more, subnormals are normalised by a subtraction.
  const UnsignedVector wide = __builtin_convertvector(bits, UnsignedVector);
  const UnsignedVector magnitude = (wide & 0x7fffu) << 13;
  const UnsignedVector exponent = magnitude & 0x0f800000u;
  const UnsignedVector normal = magnitude + (112u << 23);
  const FloatVector subnormal = bit_cast<FloatVector>(normal + (1u << 23)) - 0x1p-14f;
  UnsignedVector result = exponent == 0x0f800000u ? normal + (112u << 23) : normal;
  result = exponent == 0u ? bit_cast<UnsignedVector>(subnormal) : result;
  return bit_cast<FloatVector>(result | ((wide & 0x8000u) << 16));
#endif
}

ANNNET_INLINE HalfBitsVector narrow(FloatVector value, Float16) {
#if ANNNET_VECTOR_BYTES == 64
  return bit_cast<HalfBitsVector>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif ANNNET_VECTOR_BYTES == 32
  return bit_cast<HalfBitsVector>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  // Below 2^-14 an addition of 0.5 lets the float32 adder round to the spacing of float16's subnormals.
  const UnsignedVector bits = bit_cast<UnsignedVector>(value);
  const UnsignedVector sign = bits & 0x80000000u;
  const UnsignedVector magnitude = bits ^ sign;
  const UnsignedVector rounded = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const UnsignedVector subnormal = bit_cast<UnsignedVector>(bit_cast<FloatVector>(magnitude) + 0.5f) - 0x3f000000u;
  UnsignedVector result = magnitude < (113u << 23) ? subnormal : rounded;
  result = magnitude >= 0x47800000u ? (UnsignedVector{} + 0x7c00u) : result;  // 65536 and more; 65520 rounds up itself
  result = magnitude > 0x7f800000u ? (UnsignedVector{} + 0x7e00u) : result;
  return __builtin_convertvector(result | (sign >> 16), HalfBitsVector);
#endif
}

// ---- loads and stores of kLanes<T> elements at any address, and of the first `count` < kLanes<T> of them ----

template <class T>
ANNNET_INLINE Vec<T> load(const T* source) {
  if constexpr (sizeof(T) == 2) {
    HalfBitsVector bits;
    memcpy(&bits, source, sizeof bits);
    return widen(bits, T{});
  } else {
    Vec<T> value;
    memcpy(&value, source, sizeof value);
    return value;
  }
}

template <class T>
ANNNET_INLINE void store(T* target, Vec<T> value) {
  if constexpr (sizeof(T) == 2) {
    const HalfBitsVector bits = narrow(value, T{});
    memcpy(target, &bits, sizeof bits);
  } else {
    memcpy(target, &value, sizeof value);
  }
}

// The lanes beyond `count` are zero, and the memory beyond is not touched.
template <class T>
ANNNET_INLINE Vec<T> load_first(const T* source, int64_t count) {
#if ANNNET_VECTOR_BYTES == 64
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), source);
  } else if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), source);
  } else {
    return widen(bit_cast<HalfBitsVector>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), source)), T{});
  }
#else
  T elements[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) elements[i] = source[i];
  return load(elements);
#endif
}

template <class T>
ANNNET_INLINE void store_first(T* target, Vec<T> value, int64_t count) {
#if ANNNET_VECTOR_BYTES == 64
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(target, static_cast<__mmask8>(mask), value);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(target, static_cast<__mmask16>(mask), value);
  } else {
    _mm256_mask_storeu_epi16(target, static_cast<__mmask16>(mask), bit_cast<__m256i>(narrow(value, T{})));
  }
#else
  T elements[kLanes<T>];
  store(elements, value);
  for (int64_t i = 0; i < count; ++i) target[i] = elements[i];
#endif
}

// One element, by way of a vector where a conversion is needed.
template <class T>
ANNNET_INLINE Acc<T> load_one(const T* source) {
  if constexpr (sizeof(T) == 2) {
    HalfBitsVector bits = {};
    bits[0] = source->bits;
    return widen(bits, T{})[0];
  } else {
    return *source;
  }
}

template <class T>
ANNNET_INLINE void store_one(T* target, Acc<T> value) {
  if constexpr (sizeof(T) == 2) {
    target->bits = narrow(FloatVector{value}, T{})[0];
  } else {
    *target = value;
  }
}

// Σ lanes, in a fixed order.
template <class V>
ANNNET_INLINE auto sum_lanes(V value) {
  auto total = value[0];
  for (int lane = 1; lane < static_cast<int>(sizeof(V) / sizeof total); ++lane) total += value[lane];
  return total;
}

}  // namespace annnet::ANNNET_LEVEL
