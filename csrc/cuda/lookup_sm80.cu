// Forward on Ampere and later: what a block of rows finds in one split of the queue (kernels/lookup.py has the
// same in Triton, and the mathematics).
//
//   grid      (blocks of rows, splits of the queue)
//   warp      16 or 32 rows against every tile of the queue; two warps share 16 rows where D = 512, each with half
//             of the similarities and half of the mean's columns, since 16 x 512 sums would fill the registers
//   tile      comes by cp.async, stages ahead, and serves both products: as rows for the similarities, transposed
//             by ldmatrix for the mean. A row's 16-byte pieces are swizzled, so that eight rows meet no bank twice
//   p         goes from registers to registers: the layout of one product's result is that of the other's operand
//
// The exponent's reference is 0 as long as that is exact, which is looked at afterwards; then the block starts over
// with a running maximum that moves only when it has grown by more than 2^8 (LAZY). float16 starts there, and has
// its p raised by 2^7, as far as the largest goes without overflow: what lies 2^-31 below it still counts.
//
// Compiled once for each width, RELSSL_DIM.

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "launch.h"
#include "lookup.h"
#include "pieces.h"
#include "ptx.h"

namespace relssl {
namespace sm80 {

constexpr float LAZY = 8;  // in units of log 2

// Over the four lanes that have a row's columns.
__device__ inline float sum_of_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ inline float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

template <class T, int D, bool MEAN>
struct Block {
  static constexpr Tiles TILES = tiles_sm80(D);
  static constexpr int M = TILES.m, N = TILES.n, STAGES = TILES.stages, SHARING = TILES.sharing;
  static constexpr int THREADS = 32 * TILES.warps;
  static constexpr int F = M * SHARING / (16 * TILES.warps);  // fragments of 16 rows in a warp
  static constexpr int WN = N / SHARING, WD = D / SHARING;    // columns of a warp's similarities and mean
  static constexpr int ROW = 2 * D;                           // bytes
  static constexpr float SHIFT = std::is_same<T, FP16>::value ? 7 : 0;

  // Of the rows lane / 4 and lane / 4 + 8 of each fragment; of total and divisor this lane's share.
  struct Sums {
    float reference[F][2], total[F][2], divisor[F][2];
    float mean[F][MEAN ? WD / 8 : 1][4];
  };

  const Lookup& in;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int part = warp % SHARING;               // which columns, of warps that share rows
  const int top = warp / SHARING * 16 * F;       // the warp's first row in the block
  const int row0 = static_cast<int>(blockIdx.x) * M;
  const int begin = static_cast<int>(blockIdx.y) * in.step;
  const int end = begin + in.step < in.size ? begin + in.step : in.size;
  const uint32_t x = shared_memory(), tiles = x + M * ROW, p = tiles + STAGES * N * ROW, told = p + 2 * M * N;
  float c[F][2];

  __device__ explicit Block(const Lookup& in) : in(in) {
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) c[f][h] = load_scale(row(f, h) < in.split ? in.scale_first : in.scale_second);
  }

  // Half h of fragment f, as a row of x.
  __device__ int row(int f, int h) const { return row0 + top + 16 * f + 8 * h + lane / 4; }

  // Where a 16-byte piece of a row lies.
  static __device__ uint32_t piece(int row, int index) { return row * ROW + ((index ^ (row & 7)) << 4); }

  // COUNT rows into shared memory; source(i) is where row i lies, or null for zeros.
  template <int COUNT, class Source>
  __device__ void fetch(uint32_t to, Source source) {
    constexpr int PIECES = D / 8;
    static_assert(COUNT * PIECES % THREADS == 0, "threads share a tile evenly");
#pragma unroll
    for (int i = 0; i < COUNT * PIECES / THREADS; i++) {
      const int at = i * THREADS + threadIdx.x, r = at / PIECES, j = at % PIECES;
      const uint16_t* from = source(r);
      cp_async(to + piece(r, j), from ? from + 8 * j : in.queue, from ? 16 : 0);
    }
  }

  __device__ void fetch_x() {
    fetch<M>(x, [&](int r) -> const uint16_t* {
      const int row = row0 + r;
      if (row >= in.rows) return nullptr;
      if (row < in.split) return in.first + row * in.first_stride;
      return in.second + (row - in.split) * in.second_stride;
    });
  }

  __device__ void fetch_tile(int index) {
    const int start = begin + index * N;
    if (start < end)
      fetch<N>(tiles + index % STAGES * N * ROW, [&](int r) -> const uint16_t* {
        return start + r < in.size ? in.queue + (start + r) * in.queue_stride : nullptr;
      });
    cp_async_commit();  // even of nothing: waits count groups
  }

  // s = x tile^T, this warp's rows and columns.
  __device__ void similarities(uint32_t tile, float (&s)[F][WN / 8][4]) const {
#pragma unroll
    for (auto& fragment : s)
#pragma unroll
      for (auto& sums : fragment)
#pragma unroll
        for (float& sum : sums) sum = 0;
    // In x: rows 0-7 and 8-15, columns 0-7, then both at columns 8-15. In the tile the other way round.
    const uint32_t a_at = x + piece(top + lane % 16, lane / 16);
    const uint32_t b_at = tile + piece(part * WN + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      uint32_t a[F][4];
#pragma unroll
      for (int f = 0; f < F; f++) ldmatrix(a[f], (a_at ^ (k << 5)) + f * 16 * ROW);
#pragma unroll
      for (int n = 0; n < WN / 16; n++) {
        uint32_t b[4];
        ldmatrix(b, (b_at ^ (k << 5)) + n * 16 * ROW);
#pragma unroll
        for (int f = 0; f < F; f++) {
          mma<T>(s[f][2 * n], a[f], b[0], b[1]);
          mma<T>(s[f][2 * n + 1], a[f], b[2], b[3]);
        }
      }
    }
  }

  // Entries beyond the queue or left out become -inf.
  __device__ void mask(int start, float (&s)[F][WN / 8][4]) const {
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int64_t excluded = in.exclude && row(f, h) < in.rows ? in.exclude[row(f, h)] : -1;
#pragma unroll
        for (int n = 0; n < WN / 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int j = start + part * WN + 8 * n + lane % 4 * 2 + e;
            if (j >= in.size || j == excluded) s[f][n][2 * h + e] = -INFINITY;
          }
      }
  }

  // Move the reference of a row whose maximum has grown too far, and what was summed under it.
  __device__ void follow_maximum(const float (&s)[F][WN / 8][4], Sums& sums) const {
    float grown[F][2];
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float most = -FLT_MAX;
#pragma unroll
        for (int n = 0; n < WN / 8; n++) most = fmaxf(most, fmaxf(s[f][n][2 * h], s[f][n][2 * h + 1]));
        grown[f][h] = max_of_quad(most);
      }
    if constexpr (SHARING == 2) share(grown, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float& reference = sums.reference[f][h];
        if (__any_sync(~0u, (grown[f][h] - reference) * c[f][h] > LAZY)) {
          const float next = (grown[f][h] - reference) * c[f][h] > LAZY ? grown[f][h] : reference;
          const float factor = exp2_approx((reference - next) * c[f][h]);
          reference = next;
          sums.total[f][h] *= factor;
          if (MEAN) {
            sums.divisor[f][h] *= factor;
#pragma unroll
            for (int d = 0; d < WD / 8; d++) {
              sums.mean[f][d][2 * h] *= factor;
              sums.mean[f][d][2 * h + 1] *= factor;
            }
          }
        }
      }
  }

  // Each row's value and that of the warp it is shared with, as `merge` makes one of them.
  template <class Merge>
  __device__ void share(float (&values)[F][2], Merge merge) const {
    const auto at = [&](int part, int f, int h) { return told + 4 * (part * M + row(f, h) - row0); };
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (lane % 4 == 0) store_shared(at(part, f, h), __float_as_uint(values[f][h]));
    meet();
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        values[f][h] = merge(values[f][h], __uint_as_float(load_shared(at(1 - part, f, h))));
  }

  // The warps that share rows.
  __device__ void meet() const { barrier(1 + warp / SHARING, 32 * SHARING); }

  // p = 2^(c (s - reference)) as operands of the mean, k columns of 16 each, and their sums.
  template <bool ONLINE>
  __device__ void exponentials(const float (&s)[F][WN / 8][4], Sums& sums, uint32_t (&p)[F][WN / 16][4]) const {
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int n = 0; n < WN / 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float e[2];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const float similarity = s[f][n][2 * h + i];
            e[i] = exp2_approx(ONLINE ? (similarity - sums.reference[f][h]) * c[f][h] + SHIFT : similarity * c[f][h]);
          }
          sums.total[f][h] += e[0] + e[1];
          if (MEAN) {
            const uint32_t pair = pack<T>(e[0], e[1]);
            sums.divisor[f][h] += unpack_low<T>(pair) + unpack_high<T>(pair);
            p[f][n / 2][n % 2 * 2 + h] = pair;
          }
        }
  }

  // mean += p tile, over rows [16 k, 16 k + 16) of the tile.
  __device__ void accumulate(const uint32_t (&p)[F][4], int k, uint32_t tile, Sums& sums) const {
    const uint32_t at = tile + piece(lane % 16, lane / 16 + part * WD / 8) + k * 16 * ROW;
#pragma unroll
    for (int d = 0; d < WD / 16; d++) {
      uint32_t b[4];
      ldmatrix_transposed(b, at ^ (d << 5));
#pragma unroll
      for (int f = 0; f < F; f++) {
        mma<T>(sums.mean[f][2 * d], p[f], b[0], b[1]);
        mma<T>(sums.mean[f][2 * d + 1], p[f], b[2], b[3]);
      }
    }
  }

  // Where a 16-byte piece of a shared row of p lies: rows of N, at most 64 bytes, two to a line of the banks.
  static __device__ uint32_t piece_of_p(int row, int index) {
    return row * 2 * N + ((index ^ (row / 2 & 3)) << 4);
  }

  __device__ void accumulate(const uint32_t (&own)[F][WN / 16][4], uint32_t tile, Sums& sums) const {
    uint32_t operand[F][4];
    if constexpr (SHARING == 1) {
#pragma unroll
      for (int k = 0; k < WN / 16; k++) {
#pragma unroll
        for (int f = 0; f < F; f++)
#pragma unroll
          for (int i = 0; i < 4; i++) operand[f][i] = own[f][k][i];
        accumulate(operand, k, tile, sums);
      }
    } else {
      static_assert(F == 1 && N == 32, "two warps share 16 rows, and piece_of_p is for 64 bytes");
#pragma unroll
      for (int n = 0; n < WN / 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          store_shared(p + piece_of_p(top + 8 * h + lane / 4, part * WN / 8 + n) + lane % 4 * 4,
                       own[0][n / 2][n % 2 * 2 + h]);
      meet();
#pragma unroll
      for (int k = 0; k < N / 16; k++) {
        ldmatrix(operand[0], p + piece_of_p(top + lane % 16, lane / 16 + 2 * k));
        accumulate(operand, k, tile, sums);
      }
    }
  }

  template <bool ONLINE>
  __device__ void sweep(Sums& sums) {
#pragma unroll
    for (int f = 0; f < F; f++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        sums.reference[f][h] = ONLINE ? -FLT_MAX : 0;
        sums.total[f][h] = sums.divisor[f][h] = 0;
      }
#pragma unroll
      for (auto& column : sums.mean[f])
#pragma unroll
        for (float& sum : column) sum = 0;
    }
    for (int i = 0; i < STAGES - 1; i++) fetch_tile(i);
    for (int i = 0; begin + i * N < end; i++) {
      cp_async_wait<STAGES - 2>();  // This thread's pieces of tile i are there,
      __syncthreads();              // and with this all of them; and all have done with tile i - 1,
      fetch_tile(i + STAGES - 1);   // whose place the next one takes.
      const uint32_t tile = tiles + i % STAGES * N * ROW;
      float s[F][WN / 8][4];
      similarities(tile, s);
      if (in.exclude || begin + (i + 1) * N > in.size) mask(begin + i * N, s);
      if (ONLINE) follow_maximum(s, sums);
      uint32_t p[F][WN / 16][4];
      exponentials<ONLINE>(s, sums, p);
      if (MEAN) accumulate(p, tile, sums);
    }
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        sums.total[f][h] = sum_of_quad(sums.total[f][h]);
        if (MEAN) sums.divisor[f][h] = sum_of_quad(sums.divisor[f][h]);
      }
    if constexpr (SHARING == 2) {
      const auto add = [](float a, float b) { return a + b; };
      if (!MEAN) meet();  // Else they did, after reading maxima.
      share(sums.total, add);
      if (MEAN) {
        meet();
        share(sums.divisor, add);
      }
    }
  }

  // Whether the reference 0 served this lane's rows: what sank below 2^-126 is less than an ulp of the sum, and
  // nothing came near infinity. NaN fails.
  __device__ bool exact(const Sums& sums) const {
    bool good = true;
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float seen = sums.total[f][h];
        if (MEAN)
#pragma unroll
          for (int d = 0; d < WD / 8; d++)
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; i++) seen += sums.mean[f][d][i] - sums.mean[f][d][i];  // 0 or NaN
        good = good && seen >= in.size * 0x1p-102f && seen <= 0x1p100f;
      }
    return good;
  }

  __device__ void store(const Sums& sums) const {
    const int64_t plane = static_cast<int64_t>(gridDim.y) * in.rows;
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if (row(f, h) >= in.rows) continue;
        const int64_t at = static_cast<int64_t>(blockIdx.y) * in.rows + row(f, h);
        if (lane % 4 == 0 && part == 0) {
          in.stats[at] = sums.reference[f][h];
          in.stats[plane + at] = sums.total[f][h] * (SHIFT ? 0x1p-7f : 1);
          if (MEAN) in.stats[2 * plane + at] = sums.divisor[f][h];  // raised, as the mean is
        }
        if (MEAN)
#pragma unroll
          for (int d = 0; d < WD / 8; d++) {
            float2* to = reinterpret_cast<float2*>(in.means + at * D + part * WD + 8 * d + lane % 4 * 2);
            *to = {sums.mean[f][d][2 * h], sums.mean[f][d][2 * h + 1]};
          }
      }
  }
};

template <class T, int D, bool MEAN>
__global__ void __launch_bounds__(32 * tiles_sm80(D).warps, tiles_sm80(D).blocks)
    lookup(const __grid_constant__ Lookup in) {
  Block<T, D, MEAN> block(in);
  typename Block<T, D, MEAN>::Sums sums;
  block.fetch_x();  // Of the first group that is waited for.
  if (!std::is_same<T, FP16>::value) {
    block.template sweep<false>(sums);
    if (!__syncthreads_or(!block.exact(sums))) {
      block.store(sums);
      return;
    }
  }
  block.template sweep<true>(sums);
  block.store(sums);
}

}  // namespace sm80

template <>
void lookup_sm80<RELSSL_DIM>(const Lookup& in, bool bf16, bool mean, int splits, const Where& where) {
  constexpr int D = RELSSL_DIM;
  const auto kernel = bf16 ? (mean ? sm80::lookup<BF16, D, true> : sm80::lookup<BF16, D, false>)
                           : (mean ? sm80::lookup<FP16, D, true> : sm80::lookup<FP16, D, false>);
  const dim3 grid((in.rows + tiles_sm80(D).m - 1) / tiles_sm80(D).m, splits);
  launch(kernel, grid, 32 * tiles_sm80(D).warps, shared_sm80(D), where, in);
}

}  // namespace relssl
