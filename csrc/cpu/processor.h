// The instruction levels, lowest first, and which of them the running processor has. setup.py compiles a program of
// this file alone to learn what to build, so it needs nothing else.
#pragma once

namespace annnet {

enum class Level { baseline, avx2, avx512, avx512_bf16 };

constexpr const char* kLevelNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

inline Level processor_level() {
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

}  // namespace annnet
