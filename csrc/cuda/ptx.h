// The PTX instructions that C++ cannot express: one function for each instruction, as the PTX ISA describes it.
// Addresses in shared memory are 32-bit numbers. tests/emulation/ implements the same functions on a CPU.

#ifndef RELSSL_PTX_H
#define RELSSL_PTX_H

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace relssl {

// The format of the 16-bit elements of a row.
struct BF16 {};
struct FP16 {};

// ------------------------------------------------------------------------------------------- shared memory

// Returns the block's dynamic shared memory, as an address or as an object.
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

// Copies `bytes` bytes and fills up to 16 with zeros. The copy is complete only after cp_async_wait.
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last PENDING groups of this thread's copies are complete.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Synchronises some of the block's warps, `threads` threads in total, at the barrier `id`, 1 to 15.
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ------------------------------------------------------------------------------------------ tensor cores

// Loads four 8 x 8 matrices of 16-bit elements. Lane 8 i + j passes the address of row j of matrix i. Each lane gets
// the elements (lane / 4, lane % 4 * 2 + {0, 1}) of each matrix, or of its transpose.
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

// c [16 x 8] += a [16 x 16] b [16 x 8] by mma.m16n8k16. The PTX ISA shows the layout of the fragments.
template <class T>
__device__ __forceinline__ void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define RELSSL_MMA(T, type)                                                                                      \
  template <>                                                                                                    \
  __device__ __forceinline__ void mma<T>(float* c, const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                          \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                \
  }
RELSSL_MMA(BF16, "bf16")
RELSSL_MMA(FP16, "f16")
#undef RELSSL_MMA

// ---------------------------------------------------------------------------------------------- Hopper

using TensorMap = CUtensorMap;  // TMA's descriptor of a tensor

// Sets the number of registers of this warpgroup's threads, a multiple of 8, to less or more than before.
template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Makes ordinary stores to shared memory visible to the tensor cores and TMA.
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Arrives at the barrier `id`, which counts `threads` threads in total, without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Initialises an mbarrier, 8 bytes of shared memory. A phase ends when `count` threads and all expected bytes have
// arrived.
__device__ __forceinline__ void mbarrier_init(uint32_t at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}

// Makes initialised mbarriers visible to other threads and to TMA.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expecting(uint32_t at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended. The phase before the first one counts as ended and has parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t at, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(at), "r"(parity)
      : "memory");
}

// Makes TMA load a box of the tensor; its bytes arrive at the mbarrier.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap* tensor, int column, int row, uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(tensor), "r"(column), "r"(row), "r"(mbarrier)
      : "memory");
}

// Hides a value's origin from the compiler, which would otherwise compute descriptors ahead and keep them in registers:
// there are none to spare beside a mean of 256 columns.
__device__ __forceinline__ uint64_t opaque(uint64_t matrix) {
  asm volatile("" : "+l"(matrix));
  return matrix;
}

// Products are asynchronous, like copies. A fence is needed before the first product, and after writes to registers
// that a product reads or adds to.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving the results of a product in flight out of their registers.
template <int COUNT>
__device__ __forceinline__ void keep(float (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

// A matrix in shared memory is passed as a descriptor, in the PTX ISA's format.
//
// d [64 x N] = a b, or += if `add`, with a [64 x 16] and b [N x 16] by rows, both in shared memory.
template <class T, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add);

// d [64 x N] += a b, with a [64 x 16] in registers, as the fragments of four warps, and b [16 x N] by columns.
template <class T, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b);

#define RELSSL_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RELSSL_16(d, i) RELSSL_4(d, i), RELSSL_4(d, i + 4), RELSSL_4(d, i + 8), RELSSL_4(d, i + 12)
#define RELSSL_32(d, i) RELSSL_16(d, i), RELSSL_16(d, i + 16)
#define RELSSL_64(d, i) RELSSL_32(d, i), RELSSL_32(d, i + 32)
#define RELSSL_128(d, i) RELSSL_64(d, i), RELSSL_64(d, i + 64)
#define RELSSL_NAMES_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define RELSSL_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RELSSL_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RELSSL_NAMES_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define RELSSL_WGMMA(T, type, N, SUMS, A, B, ADD, A2, A3, A4, B2)                                                       \
  template <>                                                                                                           \
  __device__ __forceinline__ void wgmma<T, N>(float(&d)[SUMS], uint64_t a, uint64_t b, bool add) {                      \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type \
                 "." type " {" RELSSL_NAMES_##SUMS "}, %" A ", %" B ", add, 1, 1, 0, 0;\n}"                              \
                 : RELSSL_##SUMS(d, 0)                                                                                  \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                         \
  }                                                                                                                     \
  template <>                                                                                                           \
  __device__ __forceinline__ void wgmma<T, N>(float(&d)[SUMS], const uint32_t(&a)[4], uint64_t b) {                     \
    asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type    \
                 "." type " {" RELSSL_NAMES_##SUMS "}, {%" A ", %" A2 ", %" A3 ", %" A4 "}, %" B2 ", add, 1, 1, 1;\n}"   \
                 : RELSSL_##SUMS(d, 0)                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                 \
  }
#define RELSSL_WGMMAS(T, type)                                            \
  RELSSL_WGMMA(T, type, 32, 16, "16", "17", "18", "17", "18", "19", "20") \
  RELSSL_WGMMA(T, type, 64, 32, "32", "33", "34", "33", "34", "35", "36") \
  RELSSL_WGMMA(T, type, 128, 64, "64", "65", "66", "65", "66", "67", "68") \
  RELSSL_WGMMA(T, type, 256, 128, "128", "129", "130", "129", "130", "131", "132")
RELSSL_WGMMAS(BF16, "bf16")
RELSSL_WGMMAS(FP16, "f16")

// ------------------------------------------------------------------------------------------- arithmetic

// Returns 2^x with an error of at most two units in the last place, and 0 below 2^-126.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rounds two floats to 16 bits each, with the first one in the lower half; and converts them back.
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
