// Memory asked for ahead of its use, a few cache lines between two tiles of a product.
#pragma once

#include "vector.h"

namespace annnet::ANNNET_LEVEL {

// `rows` rows of `bytes` bytes. A block of pixels is many short rows far apart (in NCHW a row per channel), which the
// processor's own prefetching does not foresee: attention on 256 × 97 × 97, NCHW, one thread, took 6.0 ms without and
// 5.7 ms with this in float32, 3.5 and 3.1 ms in bfloat16; its backward 15.8 and 14.9, 10.2 and 8.6 ms.
struct Ahead {
  const char* row = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0;
  int64_t lines = 24;  // per tile
  int64_t position = 0;

  ANNNET_INLINE void step() {
    for (int64_t line = 0; line < lines && rows > 0; ++line) {
      __builtin_prefetch(row + position, 0, 2);
      position += 64;
      if (position < bytes) continue;
      position = 0;
      row += stride;
      --rows;
    }
  }
};

}  // namespace annnet::ANNNET_LEVEL
