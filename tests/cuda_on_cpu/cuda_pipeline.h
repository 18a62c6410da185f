// Asynchronous copies to shared memory on a CPU: done at the wait, so that a missing one shows.
#pragma once

#include <cuda_runtime.h>

struct PendingCopy {
  void* to;
  const void* from;
  size_t bytes;
};

// By thread of the block.
inline std::vector<PendingCopy> pending_copies[1024];

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  fake_device.count_load(from, bytes);
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) fake_device.failure = "a copy to shared memory is not aligned";
  pending_copies[threadIdx.x].push_back({to, from, bytes});
}

inline void __pipeline_commit() {}

inline void __pipeline_wait_prior(size_t) {
  for (const PendingCopy& copy : pending_copies[threadIdx.x]) memcpy(copy.to, copy.from, copy.bytes);
  pending_copies[threadIdx.x].clear();
}
