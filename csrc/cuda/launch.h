// A kernel's launch on a given device and stream: nothing is allocated and nobody waits, so it can be captured.

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

struct Where {
  int device;
  cudaStream_t stream;
};

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Makes a device the current one for as long as it lives. It is set even where it is the current one already: device 0
// is in a thread's beginning, as in those that autograd runs backward passes in, but has no context there until it is
// set, and the driver's own functions need one.
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
  if (shared > 48 << 10) allow_shared(reinterpret_cast<const void*>(kernel), shared, where.device);
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check(cudaLaunchKernel(kernel, grid, dim3(threads), arguments, shared, where.stream));
}

// Rows [size, dim] of 16 bits, `stride` elements apart, for the copy engine: boxes of `box` rows by 64 columns, swizzled
// by 128 bytes, zeros beyond the last row. The function is the driver's, asked for by name: nothing is linked to it.
inline CUtensorMap tensor_map(int device, const void* rows, int64_t stride, int size, int dim, int box) {
  const OnDevice guard(device);  // or asking for the function would wake another
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

// Bytes that a block may have.
inline int shared_memory_of(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Throws the reason where a device, its driver or what was compiled keeps a kernel from running.
inline void require(const void* kernel, int device) {
  const OnDevice guard(device);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
}

}  // namespace relssl

#endif
