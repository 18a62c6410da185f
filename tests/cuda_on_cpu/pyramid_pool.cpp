// The CUDA pooling as a library for ctypes, compiled by a C++ compiler: see test_pyramid_pool_cuda_on_cpu.py.
#include "../../csrc/cuda/pyramid_pool.cu"

#include <memory>

namespace annnet::cuda {

unsigned char shared_memory[FakeDevice::kSharedBytes + FakeDevice::kGuard];

}  // namespace annnet::cuda

namespace {

// Poisoned: what a kernel does not write is NaN for the next.
struct HostScratch : annnet::cuda::Scratch {
  void* allocate(int64_t bytes) override {
    memory.assign(static_cast<size_t>(bytes), FakeDevice::kPoison);
    return memory.data();
  }
  std::vector<unsigned char> memory;
};

}  // namespace

struct Counts {
  int64_t loads_of_16_bytes, other_loads, loaded_bytes;
};

// What failed; null if nothing did.
extern "C" const char* run_pool(const annnet::cuda::PoolCall* call, bool backward, int multiprocessors, unsigned order,
                                Counts* counts) {
  fake_device = FakeDevice();
  fake_device.multiprocessors = multiprocessors;
  fake_device.order.seed(order);
  fake_device.shared = annnet::cuda::shared_memory;
  HostScratch scratch;
  const cudaError_t error =
      backward ? annnet::cuda::pyramid_pool_bwd(*call, nullptr) : annnet::cuda::pyramid_pool(*call, scratch, nullptr);
  *counts = {fake_device.loads_of_16_bytes, fake_device.other_loads, fake_device.loaded_bytes};
  return error == cudaSuccess ? fake_device.failure : "the launch was refused";
}
