// A kernel's launch on a given device and stream: nothing is allocated and nobody waits, so it can be captured.

#ifndef RELSSL_LAUNCH_H
#define RELSSL_LAUNCH_H

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace relssl {

struct Where {
  int device;
  cudaStream_t stream;
};

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Makes a device the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (before_ == device) return;
    check(cudaSetDevice(device));
    changed_ = true;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// More than 48 KiB of shared memory must be asked for, once for each kernel and device.
inline void allow_shared(const void* kernel, int bytes, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  allowed.insert({kernel, device});
}

template <class Parameters>
void launch(void (*kernel)(Parameters), dim3 grid, int threads, int shared, const Where& where,
            const Parameters& parameters) {
  const OnDevice guard(where.device);
  const void* address = reinterpret_cast<const void*>(kernel);
  if (shared > 48 << 10) allow_shared(address, shared, where.device);
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check(cudaLaunchKernel(address, grid, dim3(threads), arguments, shared, where.stream));
}

// Throws the reason where a device, its driver or what was compiled keeps a kernel from running.
inline void require(const void* kernel, int device) {
  const OnDevice guard(device);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
}

}  // namespace relssl

#endif
