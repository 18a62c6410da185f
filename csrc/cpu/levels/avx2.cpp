// AVX2, FMA and F16C.
#if defined(__x86_64__)
#define ANNNET_LEVEL avx2
#define ANNNET_VECTOR_BYTES 32

#include "target.h"

ANNNET_TARGET_BEGIN("avx2,fma,f16c")

#include "../kernels_of_level.h"

ANNNET_TARGET_END
#endif
