// What kernels say to the hardware and C++ has no words for: one function for each instruction, as the PTX ISA
// describes it. Shared memory is addressed by 32-bit numbers. tests/emulation/ has the same functions for a CPU.

#ifndef RELSSL_PTX_H
#define RELSSL_PTX_H

#include <cuda_runtime.h>

#include <cstdint>

namespace relssl {

// What 16 bits of a row stand for.
struct BF16 {};
struct FP16 {};

// ------------------------------------------------------------------------------------------- shared memory

// The block's dynamic shared memory, as an address and as an object.
__device__ __forceinline__ uint32_t shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

template <class Object>
__device__ __forceinline__ Object& shared_object() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return *reinterpret_cast<Object*>(memory);
}

__device__ __forceinline__ void store_shared(uint32_t to, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_shared(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
  return value;
}

// 16 bytes, or with fewer `bytes` the rest zeros; they land any time before cp_async_wait says so.
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last PENDING groups of this thread have landed.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// A barrier of some of the block's warps: `threads` in all meet at barrier `id`, 1 to 15.
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ------------------------------------------------------------------------------------------ tensor cores

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + j gives the address of row j of matrix i, and gets of each
// elements (lane / 4, lane % 4 * 2 + {0, 1}), or of its transpose.
__device__ __forceinline__ void ldmatrix(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// c [16 x 8] += a [16 x 16] b [16 x 8]: mma.m16n8k16, whose fragments the PTX ISA draws.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define RELSSL_MMA(T, type)                                                                                      \
  template <>                                                                                                    \
  __device__ __forceinline__ void mma<T>(float(&c)[4], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                          \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                \
  }
RELSSL_MMA(BF16, "bf16")
RELSSL_MMA(FP16, "f16")
#undef RELSSL_MMA

// ------------------------------------------------------------------------------------------- arithmetic

// 2^x to two units in the last place; 0 below 2^-126.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to 16 bits each, the first one in the lower half; and back.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <class T>
__device__ __forceinline__ float unpack_low(uint32_t pair);
template <class T>
__device__ __forceinline__ float unpack_high(uint32_t pair);

template <>
__device__ __forceinline__ uint32_t pack<BF16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t pack<FP16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ float unpack_low<BF16>(uint32_t pair) {
  return __uint_as_float(pair << 16);
}

template <>
__device__ __forceinline__ float unpack_high<BF16>(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

template <>
__device__ __forceinline__ float unpack_low<FP16>(uint32_t pair) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(pair)));
  return value;
}

template <>
__device__ __forceinline__ float unpack_high<FP16>(uint32_t pair) {
  return unpack_low<FP16>(pair >> 16);
}

}  // namespace relssl

#endif
