// Forward on Hopper: as lookup_sm80.cu, by the copy engine and warpgroups' products.
//
//   grid       (blocks of rows, splits of the queue)
//   producer   one warpgroup, of which one thread has the copy engine (TMA) bring tiles of the queue into a ring; it
//              gives its registers to the others
//   consumers  two warpgroups of 64 rows each; where D = 512 they share 64 rows, each with half of the similarities
//              and half of the mean's columns, and p goes through shared memory
//   products   wgmma, by which the tile is read in place by rows for the similarities, and by columns for the mean
//   overlap    a warpgroup's exponentials of one tile run beside its product p tile of the tile before; and the two take
//              turns at issuing products, so that the exponentials of one run beside the products of the other
//
// A tile lies in panels of 64 columns, as the copy engine's swizzle by 128 bytes has them, and so does x.
//
// Compiled once for each width, RELSSL_DIM. Not run on a GPU yet; tests/test_cuda.py runs it on a CPU.

#include "launch.h"
#include "lookup.h"
#include "ptx.h"
#include "softmax.h"

namespace relssl {
namespace sm90 {

struct Parameters {
  TensorMap queue;  // first, for its alignment
  Lookup in;
};

constexpr int GROUP = 128;            // threads of a warpgroup
constexpr int CONSUMERS = 2 * GROUP;  // of both
constexpr int LINE = 128;             // bytes of a row in a panel
enum Barrier { EVERYONE, CONSUMERS_MEET, TURN };  // and TURN + 1, of the other consumer

// A matrix's descriptor: where it begins, in rows of 128 bytes that are swizzled by 128 bytes. Eight of them, 1,024
// bytes, are an atom, and the next eight follow. `apart` lies between atoms along a row, where the matrix is wider than
// 64 columns and read by columns.
__device__ inline uint64_t matrix(uint32_t at, uint32_t apart = 16) {
  return (at & 0x3ffff) >> 4 | uint64_t{apart >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The matrix that begins `bytes` after.
__device__ inline uint64_t further(uint64_t matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

template <class T, int D, bool MEAN>
struct Block {
  static constexpr Tiles TILES = tiles_sm90(D);
  static constexpr int M = TILES.m, N = TILES.n, STAGES = TILES.stages, SHARING = TILES.sharing;
  static constexpr int WN = N / SHARING, WD = D / SHARING;  // a warp's columns of similarities and mean
  static constexpr int TILE = 2 * N * D;                    // bytes
  static_assert(M * SHARING == 128 && 32 * TILES.warps == CONSUMERS, "two warpgroups of 64 rows");

  using Rows = Softmax<T, 1, WN, MEAN ? WD : 0, SHARING>;

  const TensorMap& queue;
  const Lookup& in;
  // Of consumers; -1 is the producer. A shuffle tells ptxas that a warp's lanes agree, and so descriptors are computed
  // once for a warp, in uniform registers: at D = 512 that spares a third of a tile's instructions.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / GROUP, 0) - 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % GROUP / 32;
  const int part = SHARING == 2 ? group : 0;
  const int top = (SHARING == 2 ? 0 : 64 * group) + 16 * warp;  // the warp's first row in the block
  const int begin = static_cast<int>(blockIdx.y) * in.step;
  const int end = begin + in.step < in.size ? begin + in.step : in.size;
  const int count = (end - begin + N - 1) / N;
  const uint32_t tiles = shared_memory(), x = tiles + STAGES * TILE;
  const uint32_t p = x + 2 * M * D, told = p + 2 * 2 * M * N;  // between warpgroups that share rows
  const uint32_t mbarriers = SHARING == 2 ? told + 4 * SHARING * M : p;
  int used = 0;  // tiles that have passed through the ring

  __device__ Block(const Parameters& parameters) : queue(parameters.queue), in(parameters.in) {}

  __device__ uint32_t tile(int i) const { return tiles + i % STAGES * TILE; }
  // Completed by the tile's bytes; and by all warps having done with it.
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

  __device__ static void meet() { barrier(CONSUMERS_MEET, CONSUMERS); }

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
    meet();
  }

  // Until tile i is there.
  __device__ void await_tile(int i) const { mbarrier_wait(full(i), i / STAGES % 2); }

  // Issues s = x tile^T, this warpgroup's rows and columns, of a tile that is there.
  __device__ void similarities(int i, typename Rows::Similarities& s) const {
    const uint64_t own = anew(matrix(x + (SHARING == 2 ? 0 : 64 * group) * LINE));
    const uint64_t other = matrix(tile(i) + part * WN * LINE);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      wgmma<T, WN>(s[0], further(own, k / 4 * M * LINE + k % 4 * 32), further(other, k / 4 * N * LINE + k % 4 * 32), k > 0);
    wgmma_commit();
  }

  // The same, waited for: nothing else is under way.
  __device__ void similarities_alone(int i, typename Rows::Similarities& s) const {
    await_tile(i);
    similarities(i, s);
    wgmma_wait<0>();
    keep(s[0]);
  }

  // Issues mean += p tile.
  __device__ void accumulate(const uint32_t (&p)[N / 16][4], int i, typename Rows::Mean& mean) const {
    const uint64_t own = matrix(tile(i) + part * WD / 64 * N * LINE, N * LINE);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < N / 16; k++) wgmma<T, WD>(mean[0], p[k], further(own, k * 16 * LINE));
    wgmma_commit();
  }

  // The warps have read tile i for the last time.
  __device__ void release(int i) const {
    if (lane == 0) mbarrier_arrive(empty(i));
  }

  // Does `work` in a basic block of its own, by a condition that always holds. Within a block ptxas moves arithmetic
  // past waits and barriers: exponentials beyond the wait for the mean, and rounding into the turn, where nothing hides
  // them and the other warpgroup's products wait for them.
  template <class Work>
  __device__ void in_block_of_its_own(Work work) const {
    if (in.step > 0) work();
  }

  // Similarities become p; whether the mean is to be multiplied by `factor`, once it is there.
  template <bool ONLINE>
  __device__ bool soften(Rows& rows, int i, typename Rows::Similarities& s, float (&factor)[1][2]) const {
    if (rows.to_be_masked(begin + i * N, N)) rows.mask(begin + i * N, s);
    bool moved = false;
    if constexpr (ONLINE) {
      const auto greater = [](float a, float b) { return fmaxf(a, b); };
      moved = rows.follow_maximum(s, factor, [&](float(&most)[1][2]) { share(most, greater); });
    }
    in_block_of_its_own([&] { rows.template exponentials<ONLINE>(s); });
    return moved;
  }

  __device__ static void await_mean(typename Rows::Mean& mean) {
    wgmma_wait<0>();
    keep(mean[0]);
  }

  // Turns at issuing products: the first consumer has the first.
  __device__ void take_turn() const { barrier(TURN + group, CONSUMERS); }
  __device__ void pass_turn() const { barrier_arrive(TURN + 1 - group, CONSUMERS); }

  // Each warpgroup with rows of its own: tile i, and if there are MORE the next one's similarities.
  template <bool ONLINE, bool MORE>
  __device__ void step(int i, Rows& rows, typename Rows::Similarities& s, typename Rows::Mean& mean) {
    float factor[1][2];
    if constexpr (MEAN) {
      const bool moved = soften<ONLINE>(rows, i, s, factor);
      await_mean(mean);  // of tile i - 1, whose operand was in the registers that this one's takes
      if (moved) rows.rescale(mean, factor);
      if (i > 0) release(used + i - 1);
      typename Rows::Operand operand;
      in_block_of_its_own([&] { rows.round(s, operand); });
      if (MORE) await_tile(used + i + 1);
      take_turn();  // From here to the first product tensor cores may be idle: nothing but descriptors.
      if (MORE) similarities(used + i + 1, s);
      accumulate(operand[0], used + i, mean);
      if (MORE || group == 0) pass_turn();
      if (MORE) wgmma_wait<1>();  // The similarities are there; the mean is on its way.
      if (MORE) keep(s[0]);
    } else {
      release(used + i);
      soften<ONLINE>(rows, i, s, factor);
      if (MORE) similarities_alone(used + i + 1, s);
    }
  }

  template <bool ONLINE>
  __device__ void sweep_apart(Rows& rows, typename Rows::Mean& mean) {
    typename Rows::Similarities s;
    if (MEAN && group == 1) pass_turn();
    similarities_alone(used, s);
    for (int i = 0; i + 1 < count; i++) step<ONLINE, true>(i, rows, s, mean);
    step<ONLINE, false>(count - 1, rows, s, mean);
    if constexpr (MEAN) {
      await_mean(mean);
      release(used + count - 1);
    }
  }

  // Both warpgroups with the same rows: the same, with p exchanged in one of two buffers.
  template <bool ONLINE, bool MORE>
  __device__ void step_shared(int i, Rows& rows, typename Rows::Similarities& s, typename Rows::Mean& mean) {
    float factor[1][2];
    if constexpr (MEAN) {
      if (soften<ONLINE>(rows, i, s, factor)) rows.rescale(mean, factor);
      const uint32_t buffer = p + i % 2 * M * LINE;
      typename Rows::Operand own;
      rows.round(s, own);
#pragma unroll
      for (int n = 0; n < WN / 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          store_shared(buffer + piece_of_p(top + 8 * h + lane / 4, part * WN / 8 + n) + lane % 4 * 4,
                       own[0][n / 2][n % 2 * 2 + h]);
      meet();
      uint32_t operand[N / 16][4];
#pragma unroll
      for (int k = 0; k < N / 16; k++) ldmatrix(operand[k], buffer + piece_of_p(top + lane % 16, lane / 16 + 2 * k));
      accumulate(operand, used + i, mean);
      if (MORE) await_tile(used + i + 1);
      if (MORE) similarities(used + i + 1, s);
      wgmma_wait<MORE>();  // The mean is there, and beside the similarities the producer can refill its tile.
      release(used + i);
      await_mean(mean);  // and with it the similarities
      if (MORE) keep(s[0]);
    } else {
      release(used + i);
      soften<ONLINE>(rows, i, s, factor);
      if (MORE) similarities_alone(used + i + 1, s);
    }
  }

  template <bool ONLINE>
  __device__ void sweep_shared(Rows& rows, typename Rows::Mean& mean) {
    typename Rows::Similarities s;
    similarities_alone(used, s);
    for (int i = 0; i + 1 < count; i++) step_shared<ONLINE, true>(i, rows, s, mean);
    step_shared<ONLINE, false>(count - 1, rows, s, mean);
  }

  static __device__ uint32_t piece_of_p(int row, int index) { return row * LINE + ((index ^ (row & 7)) << 4); }

  // Each row's value and that of the warp it is shared with, as `merge` makes one of them.
  template <class Merge>
  __device__ void share(float (&values)[1][2], Merge merge) const {
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
  __device__ void sweep(Rows& rows, typename Rows::Mean& mean) {
    rows.template start<ONLINE>();
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(mean) / sizeof(float)); i++) mean[0][i] = 0;
    if constexpr (SHARING == 2)
      sweep_shared<ONLINE>(rows, mean);
    else
      sweep_apart<ONLINE>(rows, mean);
    used += count;
    rows.finish([&](float(&sums)[1][2]) { share(sums, [](float a, float b) { return a + b; }); });
  }

  __device__ void consume() {
    fetch_x();
    Rows rows(in, static_cast<int>(blockIdx.x) * M + top, part * WN);
    typename Rows::Mean mean;
    if constexpr (!Rows::SHIFTED) {
      sweep<false>(rows, mean);
      if (!__syncthreads_or(!rows.exact(mean))) {
        rows.store(mean, D, part * WD, part == 0);
        return;
      }
    }
    sweep<true>(rows, mean);
    rows.store(mean, D, part * WD, part == 0);
  }
};

template <class T, int D, bool MEAN>
__global__ void __launch_bounds__(GROUP + CONSUMERS, 1) lookup(const __grid_constant__ Parameters parameters) {
  Block<T, D, MEAN> block(parameters);
  block.prepare();
  if (block.group < 0) {
    fewer_registers<24>();
    block.produce();
    if (!Block<T, D, MEAN>::Rows::SHIFTED && __syncthreads_or(false)) block.produce();
  } else {
    more_registers<240>();
    block.consume();
  }
}

}  // namespace sm90

template <>
void lookup_sm90<RELSSL_DIM>(const Lookup& in, bool bf16, bool mean, int splits, const Where& where) {
  constexpr int D = RELSSL_DIM;
  constexpr Tiles TILES = tiles_sm90(D);
  const auto kernel = bf16 ? (mean ? sm90::lookup<BF16, D, true> : sm90::lookup<BF16, D, false>)
                           : (mean ? sm90::lookup<FP16, D, true> : sm90::lookup<FP16, D, false>);
  const sm90::Parameters parameters{tensor_map(where.device, in.queue, in.queue_stride, in.size, D, TILES.n), in};
  const dim3 grid((in.rows + TILES.m - 1) / TILES.m, splits);
  launch(kernel, grid, sm90::GROUP + sm90::CONSUMERS, shared_sm90(D), where, parameters);
}

}  // namespace relssl
