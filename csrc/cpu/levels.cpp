#include "levels.h"

#include <cstring>

namespace annnet {

// setup.py defines ANNNET_BUILDS_… for every level whose file it compiles beside the baseline's.
namespace baseline {
extern const Kernels kernels;
}
#ifdef ANNNET_BUILDS_AVX2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef ANNNET_BUILDS_AVX512
namespace avx512 {
extern const Kernels kernels;
}
#endif
#ifdef ANNNET_BUILDS_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

// Indexed by level; null where the level is not built.
const Kernels* const kTables[] = {
    &baseline::kernels,
#ifdef ANNNET_BUILDS_AVX2
    &avx2::kernels,
#else
    nullptr,
#endif
#ifdef ANNNET_BUILDS_AVX512
    &avx512::kernels,
#else
    nullptr,
#endif
#ifdef ANNNET_BUILDS_AVX512_BF16
    &avx512_bf16::kernels,
#else
    nullptr,
#endif
};

Level level = best_level(processor_level());

}  // namespace

const char* level_name(Level level) { return kLevelNames[static_cast<int>(level)]; }

bool level_from_name(const char* name, Level* level) {
  for (int i = 0; i < kLevels; ++i) {
    if (std::strcmp(name, kLevelNames[i]) == 0) {
      *level = static_cast<Level>(i);
      return true;
    }
  }
  return false;
}

bool is_built(Level level) { return kTables[static_cast<int>(level)] != nullptr; }

Level best_level(Level limit) {
  int best = static_cast<int>(limit < processor_level() ? limit : processor_level());
  while (kTables[best] == nullptr) --best;
  return static_cast<Level>(best);
}

Level chosen_level() { return level; }

void choose_level(Level limit) { level = best_level(limit); }

const Kernels& kernels() { return *kTables[static_cast<int>(level)]; }

}  // namespace annnet
