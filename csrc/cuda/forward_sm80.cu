// The forward kernel for Ampere and later: the softmax of a block of rows over one split of the queue
// (kernels/forward.py is the same in Triton and has the mathematics).
//
//   grid      (blocks of rows, splits of the queue)
//   warp      computes 16 or 32 rows with every tile of the queue. If D = 512, two warps share 16 rows, each with half
//             of the similarities and half of the mean's columns, because 16 x 512 sums would fill the registers
//   tile      is loaded by cp.async, several stages ahead, and used by both products: by rows for the similarities,
//             transposed by ldmatrix for the mean. The 16-byte chunks of a row are swizzled, so that eight rows use
//             different banks
//   p         stays in registers: one product's result has the layout of the other's operand
//
// This file is compiled once for each width, RELSSL_DIM. The kernel has not run on a GPU yet; tests/test_cuda.py runs
// it on a CPU.

#include "launch.h"
#include "forward.h"
#include "ptx.h"
#include "softmax.h"

namespace relssl {
namespace sm80 {

template <class T, int D, bool MEAN>
struct Block {
  static constexpr Tiles TILES = tiles_sm80(D);
  static constexpr int M = TILES.m, N = TILES.n, STAGES = TILES.stages, SHARING = TILES.sharing;
  static constexpr int THREADS = 32 * TILES.warps;
  static constexpr int FRAGMENTS = M * SHARING / (16 * TILES.warps);  // of 16 rows in a warp
  static constexpr int WARP_COLUMNS = N / SHARING, WARP_WIDTH = D / SHARING;  // a warp's similarities and mean
  static constexpr int ROW = 2 * D;  // bytes

  using Sharing = SharingWarps<SHARING, M, N>;
  using Rows = Softmax<T, FRAGMENTS, WARP_COLUMNS, MEAN ? WARP_WIDTH : 0, Sharing>;

  const Forward& in;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int part = warp % SHARING;                  // of the columns, if warps share rows
  const int top = warp / SHARING * 16 * FRAGMENTS;  // the warp's first row in the block
  const int begin = static_cast<int>(blockIdx.y) * in.step;
  const int used = in.rows_in_use();
  const int end = begin + in.step < used ? begin + in.step : used;
  const uint32_t x = shared_memory(), tiles = x + M * ROW;
  const uint32_t p = tiles + STAGES * N * ROW;  // of warps that share rows
  const Sharing sharing{part, top, p + 2 * M * N, 1 + warp / SHARING, 32 * SHARING};
  Rows rows;
  typename Rows::Mean mean;

  __device__ explicit Block(const Forward& in)
      : in(in), rows(in, static_cast<int>(blockIdx.x) * M, sharing) {}

  // Returns the offset of a 16-byte chunk of a row.
  static __device__ uint32_t chunk(int row, int index) { return row * ROW + ((index ^ (row & 7)) << 4); }

  // Loads COUNT rows into shared memory; source(i) returns the address of row i, or null for zeros.
  template <int COUNT, class Source>
  __device__ void fetch(uint32_t to, Source source) {
    constexpr int CHUNKS = D / 8;
    static_assert(COUNT * CHUNKS % THREADS == 0, "each thread loads as many chunks");
#pragma unroll
    for (int i = 0; i < COUNT * CHUNKS / THREADS; i++) {
      const int at = i * THREADS + threadIdx.x, r = at / CHUNKS, j = at % CHUNKS;
      const uint16_t* from = source(r);
      cp_async(to + chunk(r, j), from ? from + 8 * j : in.queue, from ? 16 : 0);
    }
  }

  __device__ void fetch_x() {
    fetch<M>(x, [&](int r) { return in.row_of_x(static_cast<int>(blockIdx.x) * M + r); });
  }

  __device__ void fetch_tile(int index) {
    const int start = begin + index * N;
    if (start < end)
      fetch<N>(tiles + index % STAGES * N * ROW, [&](int r) -> const uint16_t* {
        return start + r < used ? in.queue + (start + r) * in.queue_stride : nullptr;
      });
    cp_async_commit();  // An empty group is committed, too, because waits count groups.
  }

  // s = x tile^T, this warp's rows and columns.
  __device__ void similarities(uint32_t tile, typename Rows::Similarities& s) const {
#pragma unroll
    for (auto& fragment : s)
#pragma unroll
      for (float& sum : fragment) sum = 0;
    // The matrices of x are rows 0-7 and 8-15 at columns 0-7, then at columns 8-15; in the tile, columns come first.
    const uint32_t a_at = x + chunk(top + lane % 16, lane / 16);
    const uint32_t b_at = tile + chunk(part * WARP_COLUMNS + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      uint32_t a[FRAGMENTS][4];
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++) ldmatrix(a[f], (a_at ^ (k << 5)) + f * 16 * ROW);
#pragma unroll
      for (int n = 0; n < WARP_COLUMNS / 16; n++) {
        uint32_t b[4];
        ldmatrix(b, (b_at ^ (k << 5)) + n * 16 * ROW);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
          mma<T>(s[f] + 8 * n, a[f], b[0], b[1]);
          mma<T>(s[f] + 8 * n + 4, a[f], b[2], b[3]);
        }
      }
    }
  }

  // mean += p tile, over rows [16 k, 16 k + 16) of the tile.
  __device__ void accumulate(const uint32_t (&p)[FRAGMENTS][4], int k, uint32_t tile) {
    const uint32_t at = tile + chunk(lane % 16, lane / 16 + part * WARP_WIDTH / 8) + k * 16 * ROW;
#pragma unroll
    for (int d = 0; d < WARP_WIDTH / 16; d++) {
      uint32_t b[4];
      ldmatrix_transposed(b, at ^ (d << 5));
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++) {
        mma<T>(mean[f] + 8 * d, p[f], b[0], b[1]);
        mma<T>(mean[f] + 8 * d + 4, p[f], b[2], b[3]);
      }
    }
  }

  __device__ void accumulate(const typename Rows::Operand& own, uint32_t tile) {
    uint32_t operand[FRAGMENTS][4];
    if constexpr (SHARING == 1) {
#pragma unroll
      for (int k = 0; k < WARP_COLUMNS / 16; k++) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
          for (int i = 0; i < 4; i++) operand[f][i] = own[f][k][i];
        accumulate(operand, k, tile);
      }
    } else {
      sharing.store_p(p, own[0]);
#pragma unroll
      for (int k = 0; k < N / 16; k++) {
        sharing.load_p(p, k, operand[0]);
        accumulate(operand, k, tile);
      }
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
      cp_async_wait<STAGES - 2>();  // This thread's part of tile i is loaded.
      __syncthreads();              // Tile i is loaded, and no thread uses tile i - 1 any more.
      fetch_tile(i + STAGES - 1);   // It replaces tile i - 1.
      const uint32_t tile = tiles + i % STAGES * N * ROW;
      typename Rows::Similarities s;
      similarities(tile, s);
      if (rows.needs_mask(begin + i * N, N)) rows.mask(begin + i * N, s);
      if constexpr (ONLINE) {
        float factor[FRAGMENTS][2];
        if (rows.follow_maximum(s, factor)) rows.rescale(mean, factor);
      }
      rows.template exponentials<ONLINE>(s);
      if constexpr (MEAN) {
        typename Rows::Operand operand;
        rows.round(s, operand);
        accumulate(operand, tile);
      }
    }
    rows.finish();
  }

  __device__ void store() const { rows.store(mean, D); }
};

template <class T, int D, bool MEAN>
__global__ void __launch_bounds__(32 * tiles_sm80(D).warps, tiles_sm80(D).blocks)
    forward(const __grid_constant__ Forward in) {
  Block<T, D, MEAN> block(in);
  block.fetch_x();  // It belongs to the first group of copies, that of the first tile.
  if constexpr (!Block<T, D, MEAN>::Rows::FLOAT16) {
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
void forward_sm80<RELSSL_DIM>(const Forward& in, bool bf16, bool mean, int num_splits, const DeviceStream& on) {
  constexpr int D = RELSSL_DIM;
  const auto kernel = bf16 ? (mean ? sm80::forward<BF16, D, true> : sm80::forward<BF16, D, false>)
                           : (mean ? sm80::forward<FP16, D, true> : sm80::forward<FP16, D, false>);
  const dim3 grid((in.rows + tiles_sm80(D).m - 1) / tiles_sm80(D).m, num_splits);
  launch(kernel, grid, 32 * tiles_sm80(D).warps, shared_sm80(D), on, in);
}

}  // namespace relssl
