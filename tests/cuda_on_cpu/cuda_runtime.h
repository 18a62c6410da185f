// CUDA for a CPU: enough of the runtime to run csrc/cuda with a C++ compiler. One thread of a block runs at a time, as
// a fiber, until it reaches a barrier; the order of the fibers is shuffled, so that a missing barrier shows.
#pragma once

#include <driver_types.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// What a test can set and read.
struct FakeDevice {
  static constexpr size_t kSharedBytes = 48 << 10, kGuard = 1 << 10;
  static constexpr unsigned char kPoison = 0xff;  // a NaN in every type

  int multiprocessors = 4;
  std::mt19937 order;
  int64_t loads_of_16_bytes = 0, other_loads = 0, loaded_bytes = 0;
  const char* failure = nullptr;
  unsigned char* shared = nullptr;

  void count_load(const void* from, size_t bytes) {
    ++(bytes == 16 ? loads_of_16_bytes : other_loads);
    loaded_bytes += static_cast<int64_t>(bytes);
    if (reinterpret_cast<uintptr_t>(from) % bytes != 0) failure = "a load is not aligned";
  }
  void run_block(const std::function<void()>& kernel, size_t shared_bytes);
};
inline FakeDevice fake_device;

// A fiber per thread of a block.
struct Fibers {
  static constexpr size_t kStackBytes = 64 << 10;

  explicit Fibers(unsigned count) : contexts(count), done(count, false), stacks(count * kStackBytes) {}

  static void enter() {
    (*current->body)();
    current->done[current->running] = true;
  }

  // Runs every fiber to its next barrier or its end; how many are not at their end.
  unsigned step(std::mt19937& order) {
    std::vector<unsigned> turns;
    for (unsigned i = 0; i < contexts.size(); ++i)
      if (!done[i]) turns.push_back(i);
    std::shuffle(turns.begin(), turns.end(), order);
    for (const unsigned i : turns) {
      running = i;
      threadIdx = dim3(i);
      swapcontext(&scheduler, &contexts[i]);
    }
    return static_cast<unsigned>(std::count(done.begin(), done.end(), false));
  }

  void wait() { swapcontext(&contexts[running], &scheduler); }

  static inline Fibers* current = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<ucontext_t> contexts;
  std::vector<bool> done;
  std::vector<char> stacks;
  ucontext_t scheduler;
  unsigned running = 0;
};

inline void FakeDevice::run_block(const std::function<void()>& kernel, size_t shared_bytes) {
  memset(shared, kPoison, kSharedBytes + kGuard);
  Fibers& fibers = *Fibers::current;
  fibers.body = &kernel;
  std::fill(fibers.done.begin(), fibers.done.end(), false);
  for (size_t i = 0; i < fibers.contexts.size(); ++i) {
    getcontext(&fibers.contexts[i]);
    fibers.contexts[i].uc_stack.ss_sp = fibers.stacks.data() + i * Fibers::kStackBytes;
    fibers.contexts[i].uc_stack.ss_size = Fibers::kStackBytes;
    fibers.contexts[i].uc_link = &fibers.scheduler;
    makecontext(&fibers.contexts[i], &Fibers::enter, 0);
  }
  while (const unsigned left = fibers.step(order))
    if (left != fibers.contexts.size()) {
      failure = "some threads of a block ended and others wait at a barrier";
      return;
    }
  for (size_t i = shared_bytes; i < kSharedBytes + kGuard; ++i)
    if (shared[i] != kPoison) failure = "shared memory beyond what was asked for was written";
}

inline void __syncthreads() { Fibers::current->wait(); }

template <class T>
T __ldcs(const T* from) {
  fake_device.count_load(from, sizeof(T));
  return *from;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  if (config->dynamicSmemBytes > FakeDevice::kSharedBytes) return cudaErrorInvalidConfiguration;
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024)
    return cudaErrorInvalidConfiguration;
  Fibers fibers(config->blockDim.x);
  Fibers::current = &fibers;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx = dim3(block);
    fake_device.run_block([&] { kernel(arguments...); }, config->dynamicSmemBytes);
  }
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = fake_device.multiprocessors, cudaSuccess;
}
