// Launches a kernel on a given device and stream. A launch neither allocates nor synchronises, so it can be captured.

#ifndef RELSSL_LAUNCH_H
#define RELSSL_LAUNCH_H

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace relssl {

struct DeviceStream {
  int device;
  cudaStream_t stream;
};

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Makes a device the current one during its lifetime. It sets the device even if that is already the current one:
// device 0 is current in a new thread, such as autograd's, but has no context there until it is set, and the driver's
// functions need a context.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Allows a kernel more than 48 KiB of shared memory, which CUDA requires once for each kernel and device.
inline void allow_shared(const void* kernel, int bytes, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  allowed.insert({kernel, device});
}

template <class Parameters>
void launch(void (*kernel)(Parameters), dim3 grid, int threads, int shared, const DeviceStream& on,
            const Parameters& parameters) {
  const OnDevice guard(on.device);
  if (shared > 48 << 10) allow_shared(reinterpret_cast<const void*>(kernel), shared, on.device);
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check(cudaLaunchKernel(kernel, grid, dim3(threads), arguments, shared, on.stream));
}

// Returns TMA's descriptor of 16-bit rows [size, dim] at a distance of `stride` elements: boxes of `box`
// rows by 64 columns, swizzled by 128 bytes, with zeros beyond the last row. The driver's function is looked up by
// name, so the extension does not link to the driver.
inline CUtensorMap tensor_map(int device, const void* rows, int64_t stride, int size, int dim, int box) {
  const OnDevice guard(device);  // The look-up would otherwise create a context on the current device.
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION < 12050
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#else
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
#endif
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(size)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * (size > 1 ? stride : dim))};
  const cuuint32_t boxes[] = {64, static_cast<cuuint32_t>(box)}, steps[] = {1, 1};
  const CUresult error = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(rows), sizes, strides, boxes,
                                steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error) throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(error));
  return map;
}

// Returns the bytes of shared memory that a block may use.
inline int max_shared_memory(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Throws an error with the reason if a kernel cannot run: because of the device, the driver or the compiled code.
inline void require(const void* kernel, int device) {
  const OnDevice guard(device);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
}

}  // namespace relssl

#endif
