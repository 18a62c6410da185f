// AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#define ANNNET_LEVEL avx512
#define ANNNET_VECTOR_BYTES 64

#include "target.h"

ANNNET_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "../kernels_of_level.h"

ANNNET_TARGET_END
#endif
