// Element types in device code: sums, rounding and 16-byte vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

namespace annnet::cuda {

// The type that sums of T are made in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ inline T narrow(Sum<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// N neighbours in memory, aligned to their size: 16 bytes, or one element.
template <class T, int N>
using Word = std::conditional_t<N == 1, T, uint4>;

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T, int N>
__device__ inline void add(Word<T, N> word, Sum<T> (&sum)[N]) {
  static_assert(sizeof(word) == N * sizeof(T));
  T elements[N];
  memcpy(elements, &word, sizeof(word));
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] += widen(elements[i]);
}

template <class T, int N>
__device__ inline Word<T, N> rounded(const Sum<T> (&sum)[N]) {
  T elements[N];
#pragma unroll
  for (int i = 0; i < N; ++i) elements[i] = narrow<T>(sum[i]);
  Word<T, N> word;
  memcpy(&word, elements, sizeof(word));
  return word;
}

}  // namespace annnet::cuda
