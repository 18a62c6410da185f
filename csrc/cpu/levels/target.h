// ANNNET_TARGET_BEGIN(names) … ANNNET_TARGET_END, the rest of a file: every function defined between them, templates
// and lambdas included, is compiled for these instruction sets. The system headers stand before, so that their inline
// functions are not. GCC instantiates templates at the end of the file, lambdas in them with the target of that place
// (GCC 12: "AVX512F vector return without AVX512F enabled"), so for GCC there is no end.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define ANNNET_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ANNNET_TARGET_BEGIN(names) \
  ANNNET_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define ANNNET_TARGET_END ANNNET_PRAGMA(clang attribute pop)
#else
#define ANNNET_TARGET_BEGIN(names) ANNNET_PRAGMA(GCC target(names))
#define ANNNET_TARGET_END
#endif
