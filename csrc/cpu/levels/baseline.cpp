// What every processor of the architecture has (SSE2 on x86-64).
#define ANNNET_LEVEL baseline
#define ANNNET_VECTOR_BYTES 16

#include "../kernels_of_level.h"
