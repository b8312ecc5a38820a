// The forward kernel for Hopper: the same as forward_sm80.cu with the Tensor Memory Accelerator (TMA) and products of warpgroups.
//
//   grid       (blocks of rows, splits of the queue)
//   producer   one warpgroup, of which one thread makes TMA load tiles of the queue into a ring
//              buffer. It passes its registers to the consumers
//   consumers  two warpgroups of 64 rows each. If D = 512 they share 64 rows, each with half of the similarities and
//              half of the mean's columns, and exchange p through shared memory
//   products   wgmma reads the tile in place, by rows for the similarities and by columns for the mean
//   overlap    a warpgroup computes the exponentials of one tile during its product p tile of the previous tile; and
//              the two warpgroups take turns at issuing products, so that the exponentials of one overlap the products
//              of the other
//
// A tile consists of panels of 64 columns, the width of TMA's swizzle by 128 bytes, and so does x.
//
// This file is compiled once for each width, RELSSL_DIM. The kernel has not run on a GPU yet; tests/test_cuda.py runs
// it on a CPU.

#include "launch.h"
#include "forward.h"
#include "ptx.h"
#include "softmax.h"

namespace relssl {
namespace sm90 {

struct Parameters {
  TensorMap queue;  // the first member, because of its alignment
  Forward in;
};

constexpr int GROUP = 128;            // threads of a warpgroup
constexpr int CONSUMERS = 2 * GROUP;  // of both
constexpr int LINE = 128;             // bytes of a row in a panel
enum Barrier { BLOCK, ALL_CONSUMERS, TURN };  // and TURN + 1, of the second consumer

// Returns the descriptor of a matrix at address `at`, whose rows have 128 bytes that are swizzled by 128 bytes. Eight
// rows, 1,024 bytes, are an atom, and the next atom follows. `stride` is the distance of atoms along a row, if the
// matrix is wider than 64 columns and read by columns.
__device__ inline uint64_t matrix(uint32_t at, uint32_t stride = 16) {
  return (at & 0x3ffff) >> 4 | uint64_t{stride >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Returns the descriptor of the matrix that begins `bytes` later.
__device__ inline uint64_t advance(uint64_t matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

template <class T, int D, bool MEAN>
struct Block {
  static constexpr Tiles TILES = tiles_sm90(D);
  static constexpr int M = TILES.m, N = TILES.n, STAGES = TILES.stages, SHARING = TILES.sharing;
  static constexpr int WARP_COLUMNS = N / SHARING, WARP_WIDTH = D / SHARING;  // a warp's similarities and mean
  static constexpr int TILE = 2 * N * D;  // bytes
  static_assert(M * SHARING == 128 && 32 * TILES.warps == CONSUMERS, "two warpgroups of 64 rows");

  using Sharing = SharingWarps<SHARING, M, N>;
  using Rows = Softmax<T, 1, WARP_COLUMNS, MEAN ? WARP_WIDTH : 0, Sharing>;

  const TensorMap& queue;
  const Forward& in;
  // The number of the consumer, or -1 for the producer. The shuffle proves to ptxas that all lanes of a warp have the
  // same value, so that it computes descriptors once per warp, in uniform registers: at D = 512 this saves a third of
  // a tile's instructions.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / GROUP, 0) - 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % GROUP / 32;
  const int part = SHARING == 2 ? group : 0;
  const int top = (SHARING == 2 ? 0 : 64 * group) + 16 * warp;  // the warp's first row in the block
  const int begin = static_cast<int>(blockIdx.y) * in.step;
  const int end = begin + in.step < in.rows_in_use() ? begin + in.step : in.rows_in_use();
  const int count = (end - begin + N - 1) / N;
  const uint32_t tiles = shared_memory(), x = tiles + STAGES * TILE;
  const uint32_t p = x + 2 * M * D;  // of warpgroups that share rows
  const Sharing sharing{part, top, p + 2 * 2 * M * N, ALL_CONSUMERS, CONSUMERS};
  const uint32_t mbarriers = SHARING == 2 ? sharing.exchange + 4 * SHARING * M : p;
  int used = 0;  // tiles that have passed through the ring buffer

  __device__ Block(const Parameters& parameters) : queue(parameters.queue), in(parameters.in) {}

  __device__ uint32_t tile(int i) const { return tiles + i % STAGES * TILE; }
  // Returns the mbarrier that the tile's bytes complete, and the one that all warps complete when they have used the
  // tile.
  __device__ uint32_t full(int i) const { return mbarriers + 8 * (i % STAGES); }
  __device__ uint32_t empty(int i) const { return mbarriers + 8 * (STAGES + i % STAGES); }

  __device__ void prepare() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < STAGES; i++) {
        mbarrier_init(full(i), 1);
        mbarrier_init(empty(i), TILES.warps);
      }
      fence_mbarrier_init();
    }
    __syncthreads();
  }

  // ------------------------------------------------------------------------------------------- producer

  __device__ void produce() {
    if (threadIdx.x == 0)
      for (int i = 0; i < count; i++) {
        const int at = used + i;
        mbarrier_wait(empty(at), at / STAGES % 2 ^ 1);
        mbarrier_arrive_expecting(full(at), TILE);
#pragma unroll 1
        for (int panel = 0; panel < D / 64; panel++)
          copy_box(tile(at) + panel * N * LINE, &queue, 64 * panel, begin + i * N, full(at));
      }
    used += count;
    __syncwarp();
  }

  // ------------------------------------------------------------------------------------------ consumers

  __device__ static void sync_consumers() { barrier(ALL_CONSUMERS, CONSUMERS); }

  __device__ void fetch_x() {
    for (int i = threadIdx.x - GROUP; i < M * D / 8; i += CONSUMERS) {
      const int r = i / (D / 8), j = i % (D / 8);
      const uint16_t* from = in.row_of_x(static_cast<int>(blockIdx.x) * M + r);
      const uint32_t to = x + j / 8 * M * LINE + r * LINE + ((j % 8 ^ (r & 7)) << 4);
      cp_async(to, from ? from + 8 * j : in.queue, from ? 16 : 0);
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy();
    sync_consumers();
  }

  // Waits until tile i is loaded.
  __device__ void await_tile(int i) const { mbarrier_wait(full(i), i / STAGES % 2); }

  // Issues s = x tile^T, for this warpgroup's rows and columns, of a tile that is loaded.
  __device__ void similarities(int i, typename Rows::Similarities& s) const {
    const uint64_t own = opaque(matrix(x + (SHARING == 2 ? 0 : 64 * group) * LINE));
    const uint64_t other = matrix(tile(i) + part * WARP_COLUMNS * LINE);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      wgmma<T, WARP_COLUMNS>(s[0], advance(own, k / 4 * M * LINE + k % 4 * 32),
                             advance(other, k / 4 * N * LINE + k % 4 * 32), k > 0);
    wgmma_commit();
  }

  // Waits for the tile and for its similarities. No other product may be in flight.
  __device__ void similarities_alone(int i, typename Rows::Similarities& s) const {
    await_tile(i);
    similarities(i, s);
    wgmma_wait<0>();
    keep(s[0]);
  }

  // Issues mean += p tile.
  __device__ void accumulate(const uint32_t (&p)[N / 16][4], int i, typename Rows::Mean& mean) const {
    const uint64_t own = matrix(tile(i) + part * WARP_WIDTH / 64 * N * LINE, N * LINE);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < N / 16; k++) wgmma<T, WARP_WIDTH>(mean[0], p[k], advance(own, k * 16 * LINE));
    wgmma_commit();
  }

  // Marks tile i as no longer in use by this warp.
  __device__ void release(int i) const {
    if (lane == 0) mbarrier_arrive(empty(i));
  }

  // Runs `work` in a basic block of its own, by a condition that is always true. Within one block ptxas moves
  // arithmetic past waits and barriers: exponentials past the wait for the mean, and rounding into the turn. There no
  // product would overlap them, and the other warpgroup's products would wait for them.
  template <class Work>
  __device__ void in_block_of_its_own(Work work) const {
    if (in.step > 0) work();
  }

  // Replaces similarities by p. Returns whether the mean must be multiplied by `factor` once it is complete.
  template <bool ONLINE>
  __device__ bool exponentials(Rows& rows, int i, typename Rows::Similarities& s, float (&factor)[1][2]) const {
    if (rows.needs_mask(begin + i * N, N)) rows.mask(begin + i * N, s);
    bool moved = false;
    if constexpr (ONLINE) moved = rows.follow_maximum(s, factor);
    in_block_of_its_own([&] { rows.template exponentials<ONLINE>(s); });
    return moved;
  }

  __device__ static void await_mean(typename Rows::Mean& mean) {
    wgmma_wait<0>();
    keep(mean[0]);
  }

  // The warpgroups take turns at issuing products; the first consumer has the first turn.
  __device__ void take_turn() const { barrier(TURN + group, CONSUMERS); }
  __device__ void pass_turn() const { barrier_arrive(TURN + 1 - group, CONSUMERS); }

  // Computes tile i and, if there are MORE tiles, issues the next one's similarities. This step needs no mean.
  template <bool ONLINE, bool MORE>
  __device__ void step_without_mean(int i, Rows& rows, typename Rows::Similarities& s) {
    float factor[1][2];
    release(used + i);
    exponentials<ONLINE>(rows, i, s, factor);
    if (MORE) similarities_alone(used + i + 1, s);
  }

  // The same with a mean, for a warpgroup with rows of its own.
  template <bool ONLINE, bool MORE>
  __device__ void step_apart(int i, Rows& rows, typename Rows::Similarities& s, typename Rows::Mean& mean) {
    float factor[1][2];
    const bool moved = exponentials<ONLINE>(rows, i, s, factor);
    await_mean(mean);  // This tile's operand takes the registers of the operand of tile i - 1.
    if (moved) rows.rescale(mean, factor);
    if (i > 0) release(used + i - 1);
    typename Rows::Operand operand;
    in_block_of_its_own([&] { rows.round(s, operand); });
    if (MORE) await_tile(used + i + 1);
    take_turn();  // The tensor cores may be idle until the first product: only descriptors are computed in between.
    if (MORE) similarities(used + i + 1, s);
    accumulate(operand[0], used + i, mean);
    if (MORE || group == 0) pass_turn();
    if (MORE) wgmma_wait<1>();  // The similarities are complete; the mean is in flight.
    if (MORE) keep(s[0]);
  }

  // The same for both warpgroups with the same rows, which exchange p in one of two buffers.
  template <bool ONLINE, bool MORE>
  __device__ void step_shared(int i, Rows& rows, typename Rows::Similarities& s, typename Rows::Mean& mean) {
    float factor[1][2];
    if (exponentials<ONLINE>(rows, i, s, factor)) rows.rescale(mean, factor);
    const uint32_t buffer = p + i % 2 * M * LINE;
    typename Rows::Operand own;
    rows.round(s, own);
    sharing.store_p(buffer, own[0]);
    uint32_t operand[N / 16][4];
#pragma unroll
    for (int k = 0; k < N / 16; k++) sharing.load_p(buffer, k, operand[k]);
    accumulate(operand, used + i, mean);
    if (MORE) await_tile(used + i + 1);
    if (MORE) similarities(used + i + 1, s);
    wgmma_wait<MORE>();  // The mean is complete: the producer can refill its tile while the similarities are in flight.
    release(used + i);
    await_mean(mean);  // The similarities are complete, too.
    if (MORE) keep(s[0]);
  }

  template <bool ONLINE, bool MORE>
  __device__ void step(int i, Rows& rows, typename Rows::Similarities& s, typename Rows::Mean& mean) {
    if constexpr (!MEAN)
      step_without_mean<ONLINE, MORE>(i, rows, s);
    else if constexpr (SHARING == 2)
      step_shared<ONLINE, MORE>(i, rows, s, mean);
    else
      step_apart<ONLINE, MORE>(i, rows, s, mean);
  }

  template <bool ONLINE>
  __device__ void sweep(Rows& rows, typename Rows::Mean& mean) {
    rows.template start<ONLINE>();
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(mean) / sizeof(float)); i++) mean[0][i] = 0;
    typename Rows::Similarities s;
    if (MEAN && SHARING == 1 && group == 1) pass_turn();
    similarities_alone(used, s);
    for (int i = 0; i + 1 < count; i++) step<ONLINE, true>(i, rows, s, mean);
    step<ONLINE, false>(count - 1, rows, s, mean);
    if constexpr (MEAN && SHARING == 1) {
      await_mean(mean);
      release(used + count - 1);
    }
    used += count;
    rows.finish();
  }

  __device__ void store_nothing() const {
    Rows rows(in, static_cast<int>(blockIdx.x) * M, sharing);
    rows.template start<true>();
    const typename Rows::Mean mean = {};
    rows.store(mean, D);
  }

  __device__ void consume() {
    fetch_x();
    Rows rows(in, static_cast<int>(blockIdx.x) * M, sharing);
    typename Rows::Mean mean;
    if constexpr (!Rows::FLOAT16) {
      sweep<false>(rows, mean);
      if (!__syncthreads_or(!rows.exact(mean))) {
        rows.store(mean, D);
        return;
      }
    }
    sweep<true>(rows, mean);
    rows.store(mean, D);
  }
};

template <class T, int D, bool MEAN>
__global__ void __launch_bounds__(GROUP + CONSUMERS, 1) forward(const __grid_constant__ Parameters parameters) {
  Block<T, D, MEAN> block(parameters);
  if (block.count <= 0) {  // No row of this split is in use.
    if (block.group >= 0) block.store_nothing();
    return;
  }
  block.prepare();
  if (block.group < 0) {
    fewer_registers<24>();
    block.produce();
    if (!Block<T, D, MEAN>::Rows::FLOAT16 && __syncthreads_or(false)) block.produce();
  } else {
    more_registers<240>();
    block.consume();
  }
}

}  // namespace sm90

template <>
void forward_sm90<RELSSL_DIM>(const Forward& in, bool bf16, bool mean, int num_splits, const DeviceStream& on) {
  constexpr int D = RELSSL_DIM;
  constexpr Tiles TILES = tiles_sm90(D);
  const auto kernel = bf16 ? (mean ? sm90::forward<BF16, D, true> : sm90::forward<BF16, D, false>)
                           : (mean ? sm90::forward<FP16, D, true> : sm90::forward<FP16, D, false>);
  const sm90::Parameters parameters{tensor_map(on.device, in.queue, in.queue_stride, in.size, D, TILES.n), in};
  const dim3 grid((in.rows + TILES.m - 1) / TILES.m, num_splits);
  launch(kernel, grid, sm90::GROUP + sm90::CONSUMERS, shared_sm90(D), on, parameters);
}

}  // namespace relssl
