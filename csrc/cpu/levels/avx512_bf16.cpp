// AVX-512 with the bfloat16 dot product (ANNNET_BF16_DOT).
#if defined(__x86_64__)
#define ANNNET_LEVEL avx512_bf16
#define ANNNET_VECTOR_BYTES 64
#define ANNNET_BF16_DOT 1

#include "target.h"

ANNNET_TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "../kernels_of_level.h"

ANNNET_TARGET_END
#endif
