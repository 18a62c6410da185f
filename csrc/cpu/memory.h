// How kernels reach memory: prefetching, and vectors of elements that lie any stride apart.
#pragma once

#include "vector.h"

namespace annnet::ANNNET_LEVEL {

// Memory is asked for this many bytes ahead, across pages, where the processor's own prefetching stops: from memory, at
// 512 × 97 × 97 in float32, summing rows took 1.00 ms without, 0.55 ms with 4 KiB and 0.32 ms with 16 KiB; writing them
// 0.69 and 0.29 ms. Beyond the end of a map nothing happens.
constexpr int64_t kAhead = 16384;

template <class T>
ANNNET_INLINE void prefetch(const T* source) {
  __builtin_prefetch(reinterpret_cast<const char*>(source) + kAhead);
}

template <class T>
ANNNET_INLINE void prefetch_to_write(T* target) {
  __builtin_prefetch(reinterpret_cast<char*>(target) + kAhead, 1);
}

// Up to a vector of the `count` elements that exist, `stride` apart. Lanes beyond them are zero, and memory beyond them
// is not touched. `count` may exceed the lanes.
template <class T>
ANNNET_INLINE Vec<T> load_lanes(const T* source, int64_t stride, int64_t count) {
  if (stride == 1) return count >= kLanes<T> ? load(source) : load_first(source, count);
  T elements[kLanes<T>] = {};
  for (int64_t i = 0; i < kLanes<T> && i < count; ++i) elements[i] = source[i * stride];
  return load(elements);
}

template <class T>
ANNNET_INLINE void store_lanes(T* target, int64_t stride, Vec<T> value, int64_t count) {
  if (stride == 1) return count >= kLanes<T> ? store(target, value) : store_first(target, value, count);
  T elements[kLanes<T>];
  store(elements, value);
  for (int64_t i = 0; i < kLanes<T> && i < count; ++i) target[i * stride] = elements[i];
}

}  // namespace annnet::ANNNET_LEVEL
