// The matrix product that all kernels use, in blocks of registers.
//
//     c[i][v] (+)= sum_k a[i * ai + k * ak] * b[k * bk + v]
//
// Elements of `a` are broadcast and `b` is read in vectors; neither must be packed. With the queue tile m as `a`,
// both products of the forward pass read the tile in place: similarities (i is a queue row, k runs along its width)
// and means (i runs along the width, k is a queue row). A block of kRows x 2 vectors keeps two FMA units busy with
// kRows + 2 loads.

#pragma once

#include "vector.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__) || defined(RELSSL_EMULATED)
constexpr int kRows = 12;  // 24 sums in 32 registers
#else
constexpr int kRows = 6;  // 12 sums in 16 registers
#endif

template <class E, int I, int V>
inline void block(const typename E::Scalar* a, int64_t ai, int64_t ak, const typename E::Scalar* b, int64_t bk,
                  int64_t depth, float* c, int64_t ci, bool add) {
  Float sum[I][V] = {};
  for (int64_t k = 0; k < depth; ++k, a += ak, b += bk) {
    typename E::Vector right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = load<typename E::Vector>(b + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = E::dot(sum[i][v], a[i * ai], right[v]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* at = c + i * ci + v * kLanes;
      store(at, add ? load<Float>(at) + sum[i][v] : sum[i][v]);
    }
  }
}

// Computes rows x (V vectors) in blocks of kRows, and one smaller block of the remaining rows.
template <class E, int V, int I = kRows>
void multiply(int64_t rows, const typename E::Scalar* a, int64_t ai, int64_t ak, const typename E::Scalar* b,
              int64_t bk, int64_t depth, float* c, int64_t ci, bool add) {
  for (; rows >= I; rows -= I, a += I * ai, c += I * ci) block<E, I, V>(a, ai, ak, b, bk, depth, c, ci, add);
  if constexpr (I > 1) {
    if (rows) multiply<E, V, I - 1>(rows, a, ai, ak, b, bk, depth, c, ci, add);
  }
}

}  // namespace
