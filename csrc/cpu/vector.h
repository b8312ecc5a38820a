// SIMD in plain C++, by the vector types of GCC and Clang. Only kernels.cpp includes this file.
//
// RELSSL_VECTOR_BYTES is the width of a vector. Everything has internal linkage: otherwise the linker could keep a
// copy of an inline function that was compiled with AVX-512, and call it on every processor.

#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

// The dot product of bfloat16 pairs, or its emulation for tests. (CXXFLAGS may define the macro for any file.)
#if defined(__AVX512BF16__) && RELSSL_VECTOR_BYTES == 64
#define RELSSL_BF16_DOT 1
#include <immintrin.h>
#endif
#if defined(RELSSL_BF16_DOT) || defined(RELSSL_EMULATED)
#define RELSSL_PAIRS 1
#endif

namespace {

constexpr int kLanes = RELSSL_VECTOR_BYTES / 4;

typedef float Float __attribute__((vector_size(RELSSL_VECTOR_BYTES)));
typedef int32_t Int __attribute__((vector_size(RELSSL_VECTOR_BYTES)));
typedef uint32_t Bits __attribute__((vector_size(RELSSL_VECTOR_BYTES)));

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline Float broadcast(float value) { return value - Float{}; }

inline Float max(Float a, Float b) { return b > a ? b : a; }  // Returns a if b is NaN.

inline bool any(Int mask) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
}

// Returns 2^x within 1.3 units in the last place for -126.5 < x < 127.5, 0 below, and NaN for NaN.
//
// x = n + f with |f| <= 1/2. Adding 1.5 * 2^23 + 127 leaves n + 127, the exponent of 2^n, in the lowest bits. 2^f is
// a polynomial of degree 6 (relative error 2e-9), fitted with its constant fixed at 1, so that 2^0 is exact.
inline Float exp2(Float x) {
  const Float low = broadcast(-127.0f), magic = broadcast(12582912.0f + 127.0f);
  x = low > x ? low : x;
  const Float n = x + magic;
  const Float f = x - (n - magic);
  Float p = broadcast(0.00015353361959569156f);
  p = p * f + 0.0013398875016719103f;
  p = p * f + 0.00961843691766262f;
  p = p * f + 0.055503323674201965f;
  p = p * f + 0.24022647738456726f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.0f;
  return p * (Float)((Bits)n << 23);
}

// Rounds to bfloat16 and converts back: to nearest, ties to even; NaN stays NaN.
inline Float round_bf16(Float x) {
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  return x == x ? (Float)rounded : x;
}

// The contents of one lane of a product, and its multiply-add.
struct Single {
  static constexpr int kDepth = 1;  // values of the contracted dimension in a lane
  using Scalar = float;
  using Vector = Float;
  static inline Float dot(Float sum, float a, Float b) { return sum + a * b; }
};

// Two bfloat16 in 32 bits, the first one in the lower half: the operand of the AVX-512 BF16 dot product.
struct Pair {
  static constexpr int kDepth = 2;
  using Scalar = uint32_t;
  using Vector = Bits;
  static inline Float dot(Float sum, uint32_t a, Bits b) {
#ifdef RELSSL_BF16_DOT
    return (Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
    // The instruction adds the second product first.
    sum += relssl::from_bf16(a >> 16) * (Float)(b & 0xffff0000u);
    return sum + relssl::from_bf16(a & 0xffff) * (Float)(b << 16);
#endif
  }
};

}  // namespace
