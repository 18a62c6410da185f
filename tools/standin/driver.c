// A libcuda for machines without a GPU. It pretends to be one Hopper GPU, loads every module, checks the grid of every
// launch and runs nothing. It holds only what Triton's driver and launchers call.
//
// Handles are numbers that count up. A query that Triton does not ask has a harmless answer.
#include <stdint.h>

typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1 };
enum { MAX_GRID_X = 2147483647, MAX_GRID_YZ = 65535 };
// Numbers of CUdevice_attribute and CUfunction_attribute, from the CUDA driver API.
enum {
  WARP_SIZE = 10,
  REGISTERS_PER_BLOCK = 12,
  CLOCK_RATE = 13,
  MULTIPROCESSORS = 16,
  SHARED_PER_MULTIPROCESSOR = 81,
  SHARED_PER_BLOCK_OPTIN = 97,
  MAX_THREADS_OF_FUNCTION = 0
};

static uintptr_t last_handle = 0x1000;
static void* new_handle(void) { return (void*)++last_handle; }

Result cuGetErrorString(Result error, const char** text) {
  *text = error == SUCCESS ? "no error" : "the stand-in driver refuses this grid";
  return SUCCESS;
}

Result cuDriverGetVersion(int* version) {
  *version = 13000;
  return SUCCESS;
}

Result cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return SUCCESS;
}

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case WARP_SIZE:
      *value = 32;
      break;
    case REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CLOCK_RATE:
      *value = 1980000;
      break;
    case MULTIPROCESSORS:
      *value = 132;
      break;
    case SHARED_PER_MULTIPROCESSOR:
      *value = 233472;
      break;
    case SHARED_PER_BLOCK_OPTIN:
      *value = 232448;
      break;
    default:
      *value = 1024;
  }
  return SUCCESS;
}

Result cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return SUCCESS;
}

Result cuCtxGetDevice(int* device) {
  *device = 0;
  return SUCCESS;
}

Result cuCtxGetLimit(uint64_t* value, int limit) {
  (void)limit;
  *value = 0;
  return SUCCESS;
}

Result cuCtxSetCurrent(void* context) {
  (void)context;
  return SUCCESS;
}

Result cuCtxSetLimit(int limit, uint64_t value) {
  (void)limit, (void)value;
  return SUCCESS;
}

Result cuDevicePrimaryCtxRetain(void** context, int device) {
  (void)device;
  *context = (void*)1;
  return SUCCESS;
}

Result cuModuleLoadData(void** module, const void* image) {
  (void)image;
  *module = new_handle();
  return SUCCESS;
}

Result cuModuleUnload(void* module) {
  (void)module;
  return SUCCESS;
}

Result cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module, (void)name;
  *function = new_handle();
  return SUCCESS;
}

Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  (void)function;
  *value = attribute == MAX_THREADS_OF_FUNCTION ? 1024 : 0;
  return SUCCESS;
}

Result cuFuncSetAttribute(void* function, int attribute, int value) {
  (void)function, (void)attribute, (void)value;
  return SUCCESS;
}

Result cuFuncSetCacheConfig(void* function, int configuration) {
  (void)function, (void)configuration;
  return SUCCESS;
}

// Any address counts as device memory.
Result cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  (void)attribute;
  *(uint64_t*)data = pointer;
  return SUCCESS;
}

Result cuPointerGetAttributes(unsigned count, int* attributes, void** data, uint64_t pointer) {
  (void)attributes;
  for (unsigned i = 0; i < count; ++i)
    if (data[i]) *(uint64_t*)data[i] = pointer;
  return SUCCESS;
}

// CUlaunchConfig begins with the three dimensions of the grid.
Result cuLaunchKernelEx(const unsigned* grid, void* function, void** parameters, void** extra) {
  (void)function, (void)parameters, (void)extra;
  const int fits = grid[0] >= 1 && grid[1] >= 1 && grid[2] >= 1 && grid[0] <= MAX_GRID_X && grid[1] <= MAX_GRID_YZ &&
                   grid[2] <= MAX_GRID_YZ;
  return fits ? SUCCESS : INVALID_VALUE;
}

Result cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* configuration) {
  (void)function, (void)configuration;
  *clusters = 1;
  return SUCCESS;
}

Result cuTensorMapEncodeTiled(void) { return SUCCESS; }
Result cuTensorMapEncodeIm2col(void) { return SUCCESS; }
