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
// Compiled once for each width, RELSSL_DIM. Not run on a GPU yet; tests/test_cuda.py runs it on a CPU.

#include "launch.h"
#include "lookup.h"
#include "ptx.h"
#include "softmax.h"

namespace relssl {
namespace sm80 {

template <class T, int D, bool MEAN>
struct Block {
  static constexpr Tiles TILES = tiles_sm80(D);
  static constexpr int M = TILES.m, N = TILES.n, STAGES = TILES.stages, SHARING = TILES.sharing;
  static constexpr int THREADS = 32 * TILES.warps;
  static constexpr int F = M * SHARING / (16 * TILES.warps);  // fragments of 16 rows in a warp
  static constexpr int WN = N / SHARING, WD = D / SHARING;    // a warp's columns of similarities and mean
  static constexpr int ROW = 2 * D;                           // bytes

  using Rows = Softmax<T, F, WN, MEAN ? WD : 0, SHARING>;

  const Lookup& in;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int part = warp % SHARING;          // which columns, of warps that share rows
  const int top = warp / SHARING * 16 * F;  // the warp's first row in the block
  const int begin = static_cast<int>(blockIdx.y) * in.step;
  const int end = begin + in.step < in.size ? begin + in.step : in.size;
  const uint32_t x = shared_memory(), tiles = x + M * ROW;
  const uint32_t p = tiles + STAGES * N * ROW, told = p + 2 * M * N;  // between warps that share rows
  Rows rows;
  typename Rows::Mean mean;

  __device__ explicit Block(const Lookup& in)
      : in(in), rows(in, static_cast<int>(blockIdx.x) * M + top, part * WN) {}

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
    fetch<M>(x, [&](int r) { return in.row_of_x(static_cast<int>(blockIdx.x) * M + r); });
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
  __device__ void similarities(uint32_t tile, typename Rows::Similarities& s) const {
#pragma unroll
    for (auto& fragment : s)
#pragma unroll
      for (float& sum : fragment) sum = 0;
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
          mma<T>(s[f] + 8 * n, a[f], b[0], b[1]);
          mma<T>(s[f] + 8 * n + 4, a[f], b[2], b[3]);
        }
      }
    }
  }

  // mean += p tile, over rows [16 k, 16 k + 16) of the tile.
  __device__ void accumulate(const uint32_t (&p)[F][4], int k, uint32_t tile) {
    const uint32_t at = tile + piece(lane % 16, lane / 16 + part * WD / 8) + k * 16 * ROW;
#pragma unroll
    for (int d = 0; d < WD / 16; d++) {
      uint32_t b[4];
      ldmatrix_transposed(b, at ^ (d << 5));
#pragma unroll
      for (int f = 0; f < F; f++) {
        mma<T>(mean[f] + 8 * d, p[f], b[0], b[1]);
        mma<T>(mean[f] + 8 * d + 4, p[f], b[2], b[3]);
      }
    }
  }

  __device__ void accumulate(const typename Rows::Operand& own, uint32_t tile) {
    uint32_t operand[F][4];
    if constexpr (SHARING == 1) {
#pragma unroll
      for (int k = 0; k < WN / 16; k++) {
#pragma unroll
        for (int f = 0; f < F; f++)
#pragma unroll
          for (int i = 0; i < 4; i++) operand[f][i] = own[f][k][i];
        accumulate(operand, k, tile);
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
        accumulate(operand, k, tile);
      }
    }
  }

  // Where a 16-byte piece of a shared row of p lies: rows of N, at most 64 bytes, two to a line of the banks.
  static __device__ uint32_t piece_of_p(int row, int index) { return row * 2 * N + ((index ^ (row / 2 & 3)) << 4); }

  // The warps that share rows.
  __device__ void meet() const { barrier(1 + warp / SHARING, 32 * SHARING); }

  // Each row's value and that of the warp it is shared with, as `merge` makes one of them.
  template <class Merge>
  __device__ void share(float (&values)[F][2], Merge merge) const {
    if constexpr (SHARING == 2) {
      const auto at = [&](int part, int h) { return told + 4 * (part * M + top + 8 * h + lane / 4); };
      meet();  // until what was told last has been read
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (lane % 4 == 0) store_shared(at(part, h), __float_as_uint(values[0][h]));
      meet();
#pragma unroll
      for (int h = 0; h < 2; h++) values[0][h] = merge(values[0][h], __uint_as_float(load_shared(at(1 - part, h))));
    }
  }

  template <bool ONLINE>
  __device__ void sweep() {
    rows.template start<ONLINE>();
#pragma unroll
    for (auto& fragment : mean)
#pragma unroll
      for (float& sum : fragment) sum = 0;
    for (int i = 0; i < STAGES - 1; i++) fetch_tile(i);
    for (int i = 0; begin + i * N < end; i++) {
      cp_async_wait<STAGES - 2>();  // This thread's pieces of tile i are there,
      __syncthreads();              // and with this all of them; and all have done with tile i - 1,
      fetch_tile(i + STAGES - 1);   // whose place the next one takes.
      const uint32_t tile = tiles + i % STAGES * N * ROW;
      typename Rows::Similarities s;
      similarities(tile, s);
      if (rows.to_be_masked(begin + i * N, N)) rows.mask(begin + i * N, s);
      if constexpr (ONLINE) {
        float factor[F][2];
        const auto greater = [](float a, float b) { return fmaxf(a, b); };
        if (rows.follow_maximum(s, factor, [&](float(&most)[F][2]) { share(most, greater); }))
          rows.rescale(mean, factor);
      }
      rows.template exponentials<ONLINE>(s);
      if constexpr (MEAN) {
        typename Rows::Operand operand;
        rows.round(s, operand);
        accumulate(operand, tile);
      }
    }
    rows.finish([&](float(&sums)[F][2]) { share(sums, [](float a, float b) { return a + b; }); });
  }

  __device__ void store() const { rows.store(mean, D, part * WD, part == 0); }
};

template <class T, int D, bool MEAN>
__global__ void __launch_bounds__(32 * tiles_sm80(D).warps, tiles_sm80(D).blocks)
    lookup(const __grid_constant__ Lookup in) {
  Block<T, D, MEAN> block(in);
  block.fetch_x();  // Of the first group that is waited for.
  if constexpr (!Block<T, D, MEAN>::Rows::SHIFTED) {
    block.template sweep<false>();
    if (!__syncthreads_or(!block.rows.exact(block.mean))) {
      block.store();
      return;
    }
  }
  block.template sweep<true>();
  block.store();
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
