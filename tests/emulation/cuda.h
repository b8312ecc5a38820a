// Emulates CUDA on a CPU for tests: g++ compiles csrc/cuda with this header in place of ptx.h. Fragments and matrices
// have the layouts of the PTX ISA. machine.h runs the threads, and toolkit/ replaces CUDA's own headers.

#ifndef RELSSL_EMULATION_CUDA_H
#define RELSSL_EMULATION_CUDA_H
#define RELSSL_PTX_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "machine.h"
#include "toolkit/cuda_runtime.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (dim3(::emulation::machine.current()))
#define blockIdx (::emulation::machine.block)
#define gridDim (::emulation::machine.grid)

struct float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

// ------------------------------------------------------------------------------------------- CUDA's own

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void __syncthreads() {
  auto& m = emulation::machine;
  m.arrive(m.barrier(0), m.threads(), "__syncthreads", [] {});
}

inline bool __syncthreads_or(bool own) {
  auto& m = emulation::machine;
  m.arrive(m.barrier(0), m.threads(), "__syncthreads_or (before)", [&] { m.vote = false; });
  m.vote = m.vote || own;
  m.arrive(m.barrier(0), m.threads(), "__syncthreads_or", [] {});
  return m.vote;
}

// Returns the value of another lane.
template <class T>
T __shfl_sync(unsigned, T x, int from) {
  struct Lane {
    T value, result;
    int from;
  } own{x, x, from};
  emulation::machine.together(32, "a shuffle", &own, [](void** arguments) {
    for (int i = 0; i < 32; i++) {
      auto* lane = static_cast<Lane*>(arguments[i]);
      lane->result = static_cast<Lane*>(arguments[lane->from])->value;
    }
  });
  return own.result;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return __shfl_sync(mask, x, emulation::machine.current() % 32 ^ lanes);
}

inline bool __any_sync(unsigned, bool own) {
  emulation::machine.together(32, "__any_sync", &own, [](void** arguments) {
    bool any = false;
    for (int i = 0; i < 32; i++) any = any || *static_cast<bool*>(arguments[i]);
    for (int i = 0; i < 32; i++) *static_cast<bool*>(arguments[i]) = any;
  });
  return own;
}

namespace relssl {

// ------------------------------------------------------------------------------------------------ ptx.h

using TensorMap = CUtensorMap;

struct BF16 {};
struct FP16 {};

template <class T>
float from_bits(uint16_t bits);

template <>
inline float from_bits<BF16>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

inline float from_half(int bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.f + fraction, exponent - 25)
                                    : std::ldexp(static_cast<float>(fraction), -24);
  return bits >> 15 ? -size : size;
}

template <>
inline float from_bits<FP16>(uint16_t bits) {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (int i = 0; i < 1 << 16; i++) all[i] = from_half(i);
    return all;
  }();
  return values[bits];
}

template <class T>
uint16_t to_bits(float x);

template <>
inline uint16_t to_bits<BF16>(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = __float_as_uint(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <>
inline uint16_t to_bits<FP16>(float x) {
  const uint16_t sign = std::signbit(x) << 15;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);                       // size = [1/2, 1) 2^exponent
  const int last = (exponent < -13 ? -13 : exponent) - 11;  // the exponent of the last digit
  const int digits = std::lrint(std::ldexp(size, -last));    // to nearest, ties to even
  return sign | (digits < 1024 ? digits : ((last + 25 - 1) << 10) + digits);
}

template <class T>
uint32_t pack(float low, float high) {
  return to_bits<T>(low) | static_cast<uint32_t>(to_bits<T>(high)) << 16;
}

template <class T>
float unpack_low(uint32_t pair) {
  return from_bits<T>(pair & 0xffff);
}

template <class T>
float unpack_high(uint32_t pair) {
  return from_bits<T>(pair >> 16);
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}

inline uint32_t shared_memory() { return 0; }

template <class Object>
Object& shared_object() {
  return *reinterpret_cast<Object*>(emulation::machine.shared(0, 1));
}

inline void store_shared(uint32_t to, uint32_t value) {
  emulation::machine.write(emulation::machine.current(), to, &value, 4);
}

inline uint32_t load_shared(uint32_t from) {
  uint32_t value;
  std::memcpy(&value, emulation::machine.shared(from, 4), 4);
  return value;
}

inline void cp_async(uint32_t to, const void* from, int bytes) {
  emulation::machine.copy([to, from, bytes, writer = emulation::machine.current()] {
    uint8_t piece[16] = {};
    std::memcpy(piece, from, bytes);
    emulation::machine.write(writer, to, piece, 16);
  });
}
inline void cp_async_commit() { emulation::machine.fiber().copies.group++; }

template <int PENDING>
void cp_async_wait() {
  emulation::machine.wait_for_copies(PENDING);
}

inline void barrier(int id, int threads) {
  emulation::machine.arrive(emulation::machine.barrier(id), threads, "barrier", [] {});
}

inline void ldmatrix(uint32_t (&to)[4], uint32_t row, bool transposed, const char* what) {
  struct Lane {
    uint32_t* to;
    uint32_t row;
    bool transposed;
  } own{to, row, transposed};
  emulation::machine.together(32, what, &own, [](void** arguments) {
    for (int matrix = 0; matrix < 4; matrix++) {
      uint16_t elements[8][8];
      for (int i = 0; i < 8; i++) {
        const uint32_t row = static_cast<Lane*>(arguments[8 * matrix + i])->row;
        std::memcpy(elements[i], emulation::machine.shared(row, 16), 16);
      }
      for (int i = 0; i < 32; i++) {
        const auto* lane = static_cast<Lane*>(arguments[i]);
        const auto at = [&](int e) {
          const int r = i / 4, c = i % 4 * 2 + e;
          return static_cast<uint32_t>(lane->transposed ? elements[c][r] : elements[r][c]);
        };
        lane->to[matrix] = at(0) | at(1) << 16;
      }
    }
  });
}

inline void ldmatrix(uint32_t (&to)[4], uint32_t row) { ldmatrix(to, row, false, "ldmatrix"); }
inline void ldmatrix_transposed(uint32_t (&to)[4], uint32_t row) { ldmatrix(to, row, true, "ldmatrix.trans"); }

// Products are exact, and each sum is rounded once.
template <class T>
void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } own{c, a, {b0, b1}};
  emulation::machine.together(32, "mma", &own, [](void** arguments) {
    float a[16][16], b[8][16];  // b by columns
    for (int i = 0; i < 32; i++) {
      const auto* lane = static_cast<Lane*>(arguments[i]);
      for (int r = 0; r < 4; r++) {
        float* to = a[i / 4 + r % 2 * 8] + i % 4 * 2 + r / 2 * 8;
        to[0] = unpack_low<T>(lane->a[r]);
        to[1] = unpack_high<T>(lane->a[r]);
      }
      for (int r = 0; r < 2; r++) {
        float* to = b[i / 4] + i % 4 * 2 + r * 8;
        to[0] = unpack_low<T>(lane->b[r]);
        to[1] = unpack_high<T>(lane->b[r]);
      }
    }
    for (int i = 0; i < 32; i++)
      for (int r = 0; r < 4; r++) {
        const float *row = a[i / 4 + r / 2 * 8], *column = b[i % 4 * 2 + r % 2];
        float& sum = static_cast<Lane*>(arguments[i])->c[r];
        double exact = sum;
        for (int k = 0; k < 16; k++) exact += static_cast<double>(row[k]) * column[k];
        sum = static_cast<float>(exact);
      }
  });
}

}  // namespace relssl

#include "hopper.h"

#endif
