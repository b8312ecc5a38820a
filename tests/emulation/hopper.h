// Emulates what Hopper adds: mbarriers, TMA, and products of warpgroups. This file is a part of cuda.h.

#pragma once

#include "machine.h"

namespace relssl {

template <int>
void fewer_registers() {}
template <int>
void more_registers() {}
template <int COUNT>
void keep(float (&)[COUNT]) {}
inline uint64_t opaque(uint64_t matrix) { return matrix; }
inline void wgmma_fence() {}
inline void fence_mbarrier_init() {}
inline void __syncwarp() {
  emulation::machine.together(32, "__syncwarp", nullptr, [](void**) {});
}

inline void fence_proxy() { emulation::machine.fence(); }

inline void barrier_arrive(int id, int threads) {
  emulation::machine.arrive(emulation::machine.barrier(id), threads, "barrier", [] {}, false);
}

inline void mbarrier_init(uint32_t at, int count) {
  auto& m = emulation::machine.mbarrier(at);
  m = {};
  m.count = m.pending = count;
}

inline void mbarrier_arrive_expecting(uint32_t at, int bytes) {
  auto& m = emulation::machine.mbarrier(at);
  m.bytes += bytes;
  m.pending--;
  emulation::machine.settle(m);
}

// The threads that waited may continue before this one.
inline void mbarrier_arrive(uint32_t at) {
  mbarrier_arrive_expecting(at, 0);
  emulation::machine.yield();
}
inline void mbarrier_wait(uint32_t at, int parity) { emulation::machine.wait(emulation::machine.mbarrier(at), parity); }

// Swizzles bits 4 to 6 of an address by bits 7 to 9.
inline uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

inline void copy_box(uint32_t to, const TensorMap* tensor, int column, int row, uint32_t mbarrier) {
  emulation::machine.bulk([=, map = *tensor] {
    for (int r = 0; r < map.box; r++)
      for (int c = 0; c < 64; c++) {
        const bool inside = row + r < map.size && column + c < map.dim;
        const uint16_t element = inside ? map.rows[(row + r) * map.stride + column + c] : 0;
        std::memcpy(emulation::machine.shared(swizzled(to + r * 128 + c * 2), 2), &element, 2);
      }
    auto& m = emulation::machine.mbarrier(mbarrier);
    m.bytes -= map.box * 128;
    emulation::machine.settle(m);
  });
}

inline void wgmma_commit() { emulation::machine.fiber().products++; }

// The whole warp waits: otherwise one thread could complete products before another has reached the instruction before
// this one.
template <int PENDING>
void wgmma_wait() {
  __syncwarp();
  emulation::machine.wait_for_products(PENDING);
}

// Returns an element of a matrix given by its descriptor, read by rows or by columns.
template <class T>
float element(uint64_t matrix, int row, int column, bool by_columns) {
  if (matrix >> 62 != 1) emulation::machine.fail("a matrix is not swizzled by 128 bytes");
  const auto bytes = [&](int at) { return static_cast<uint32_t>(matrix >> at & 0x3fff) << 4; };
  const uint32_t atom = by_columns ? column / 64 * bytes(16) + row / 8 * bytes(32) : row / 8 * bytes(32);
  const uint32_t at = bytes(0) + atom + row % 8 * 128 + (by_columns ? column % 64 : column) * 2;
  uint16_t bits;
  std::memcpy(&bits, emulation::machine.read_unordered(swizzled(at), 2), 2);
  return from_bits<T>(bits);
}

// Return the row and column of register i of a thread, in a product of 128 threads.
inline int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8; }
inline int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

struct Product {
  float* d[128];
  float a[64][16];
  uint64_t a_at, b_at;
  bool in_registers, add;
};

// d [64 x N] = a b (+ d). Only when the product runs does it read operands from shared memory and write the sums.
template <class T, int N>
void multiply(Product& product) {
  static float b[16][256];
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < N; n++)
      b[k][n] = product.in_registers ? element<T>(product.b_at, k, n, true) : element<T>(product.b_at, n, k, false);
  for (int r = 0; r < 64 && !product.in_registers; r++)
    for (int k = 0; k < 16; k++) product.a[r][k] = element<T>(product.a_at, r, k, false);
  for (int thread = 0; thread < 128; thread++)
    for (int i = 0; i < N / 2; i++) {
      const float* row = product.a[row_of(thread, i)];
      float& sum = product.d[thread][i];
      double exact = product.add ? sum : 0;
      for (int k = 0; k < 16; k++) exact += static_cast<double>(row[k]) * b[k][column_of(thread, i)];
      sum = static_cast<float>(exact);
    }
}

template <class T, int N>
void issue(float* d, const uint32_t* a, uint64_t a_at, uint64_t b_at, bool add) {
  struct Thread {
    float* d;
    const uint32_t* a;
    uint64_t a_at, b_at;
    bool add;
  } own{d, a, a_at, b_at, add};
  emulation::machine.together(128, a ? "wgmma of registers" : "wgmma", &own, [](void** arguments) {
    auto product = std::make_shared<Product>();
    const auto* first = static_cast<Thread*>(arguments[0]);
    product->a_at = first->a_at;
    product->b_at = first->b_at;
    product->add = first->add;
    product->in_registers = first->a;
    for (int thread = 0; thread < 128; thread++) {
      const auto* t = static_cast<Thread*>(arguments[thread]);
      if (t->a_at != first->a_at || t->b_at != first->b_at || t->add != first->add)
        emulation::machine.fail("threads of a warpgroup multiply different matrices");
      product->d[thread] = t->d;
      // The registers of a fragment: each is two columns of a row, the second is 8 rows on, the third 8 columns on.
      for (int i = 0; i < 8 && t->a; i++) {
        const uint32_t pair = t->a[i / 2];
        product->a[row_of(thread, i)][column_of(thread, i)] = i % 2 ? unpack_high<T>(pair) : unpack_low<T>(pair);
      }
    }
    auto& machine = emulation::machine;
    machine.products().open.push_back({[product] { multiply<T, N>(*product); }, machine.fiber().products});
  });
}

template <class T, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  issue<T, N>(d, nullptr, a, b, add);
}

template <class T, int N>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  issue<T, N>(d, a, 0, b, true);
}

}  // namespace relssl
