// The parts of CUDA's runtime and driver that csrc/cuda/launch.h uses. As in CUDA 12 and later, device 0 is current
// in a new thread, which has no context. The driver's functions need a context, and here only cudaSetDevice creates
// one.
#pragma once

#include <cstdint>

#include "../machine.h"

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice = 101 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_CONTEXT = 201 };
enum { cudaEnableDefault, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { CU_TENSOR_MAP_DATA_TYPE_UINT16, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum { CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
struct cudaFuncAttributes {};

namespace emulation {

constexpr int DEVICES = 2;
inline thread_local int device = 0;
inline thread_local bool context = false;
inline int launched_on = -1;

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::DEVICES) return cudaErrorInvalidDevice;
  emulation::device = device;
  emulation::context = true;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* bytes, int, int) {
  *bytes = 1 << 20;
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }

template <class Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters), dim3 grid, dim3 threads, void** arguments, size_t shared,
                             cudaStream_t) {
  emulation::launched_on = emulation::device;
  emulation::machine.run(grid, threads.x, shared, [&] { kernel(*static_cast<Parameters*>(arguments[0])); });
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------ the driver

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

struct CUtensorMap {
  const uint16_t* rows;
  int64_t stride;
  int size, dim, box;
};

using PFN_cuTensorMapEncodeTiled_v12000 = CUresult (*)(CUtensorMap*, int, int, void*, const cuuint64_t*, const cuuint64_t*,
                                                       const cuuint32_t*, const cuuint32_t*, int, int, int, int);

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, int, int, void* rows, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* boxes, const cuuint32_t*, int, int, int,
                                       int) {
  if (!emulation::context) return CUDA_ERROR_INVALID_CONTEXT;
  *map = {static_cast<const uint16_t*>(rows), static_cast<int64_t>(strides[0] / 2), static_cast<int>(sizes[1]),
          static_cast<int>(sizes[0]), static_cast<int>(boxes[1])};
  return CUDA_SUCCESS;
}

inline cudaError_t found(void** function, cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

#if CUDART_VERSION >= 12050
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  return found(function, result);
}
#endif
#if CUDART_VERSION < 13000
inline cudaError_t cudaGetDriverEntryPoint(const char*, void** function, unsigned long long,
                                           cudaDriverEntryPointQueryResult* result) {
  return found(function, result);
}
#endif
