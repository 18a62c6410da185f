#include "levels.h"

#include <cstring>

namespace annnet {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Level level = highest_level();

}  // namespace

const char* level_name(Level level) { return kNames[static_cast<int>(level)]; }

bool level_from_name(const char* name, Level* level) {
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *level = static_cast<Level>(i);
      return true;
    }
  }
  return false;
}

Level highest_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Level::avx512_bf16;
  if (avx512) return Level::avx512;
  if (avx2) return Level::avx2;
#endif
  return Level::baseline;
}

Level chosen_level() { return level; }

void choose_level(Level wanted) { level = wanted; }

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (level) {
    case Level::avx512_bf16:
      return avx512_bf16::kernels;
    case Level::avx512:
      return avx512::kernels;
    case Level::avx2:
      return avx2::kernels;
    case Level::baseline:
      break;
  }
#endif
  return baseline::kernels;
}

}  // namespace annnet
