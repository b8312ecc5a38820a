// The softmax of a warp's rows, computed tile by tile between the two products of every forward kernel.
//
// The exponent's shift is 0 if that is exact, which is checked afterwards (`exact`). If it is not, the block starts
// again ONLINE: with a running maximum as the shift, which changes only when the maximum has grown by more than
// 2^LAZY. float16 always runs ONLINE and multiplies p by 2^7, the largest factor that cannot overflow, so that p
// keeps entries down to 2^-31 of the largest.
//
// Registers hold fragments as the tensor cores write them: a fragment is 16 rows, of which a lane holds the rows lane
// / 4 and lane / 4 + 8, and two of every 8 columns.

#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "forward.h"
#include "ptx.h"
#include "scale.h"

namespace relssl {

constexpr float LAZY = 8;  // in units of log 2

// Reduces over the four lanes that hold the columns of a row.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// The SHARING warps that compute the same rows of a tile [M, N], each for its own part of the columns. Two warps that
// share 16 rows exchange values and p through shared memory.
template <int SHARING, int M, int N>
struct SharingWarps {
  const int part;                 // this warp's part of the columns
  const int top;                  // the warp's first row in the block
  const uint32_t exchange;        // shared memory for a float of each part and row
  const int barrier_id, threads;  // the barrier of these warps
  const int lane = threadIdx.x % 32;

  __device__ void sync_sharing_warps() const { barrier(barrier_id, threads); }

  // Merges each row's value with that of the other warp.
  template <int FRAGMENTS, class Merge>
  __device__ void share(float (&values)[FRAGMENTS][2], Merge merge) const {
    if constexpr (SHARING == 2) {
      static_assert(FRAGMENTS == 1, "two warps share 16 rows");
      const auto at = [&](int part, int h) { return exchange + 4 * (part * M + top + 8 * h + lane / 4); };
      sync_sharing_warps();  // The values of the previous exchange have been read.
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (lane % 4 == 0) store_shared(at(part, h), __float_as_uint(values[0][h]));
      sync_sharing_warps();
#pragma unroll
      for (int h = 0; h < 2; h++) values[0][h] = merge(values[0][h], __uint_as_float(load_shared(at(1 - part, h))));
    }
  }

  // Returns the offset of a 16-byte chunk of a row of p [M, N], swizzled so that eight rows use different banks.
  static __device__ uint32_t chunk_of_p(int row, int index) {
    static_assert(N == 32 || N == 64, "a row of p is 64 or 128 bytes");
    return row * 2 * N + ((index ^ (row / (64 / N) & (N / 8 - 1))) << 4);
  }

  // Writes this warp's columns of p to shared memory, and waits until both warps have done so.
  __device__ void store_p(uint32_t p, const uint32_t (&own)[N / SHARING / 16][4]) const {
#pragma unroll
    for (int n = 0; n < N / SHARING / 8; n++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        store_shared(p + chunk_of_p(top + 8 * h + lane / 4, part * (N / SHARING / 8) + n) + lane % 4 * 4,
                     own[n / 2][n % 2 * 2 + h]);
    sync_sharing_warps();
  }

  // Loads the operand of the mean's product from p: this warp's rows, columns [16 k, 16 k + 16).
  __device__ void load_p(uint32_t p, int k, uint32_t (&operand)[4]) const {
    ldmatrix(operand, p + chunk_of_p(top + lane % 16, lane / 16 + 2 * k));
  }
};

// FRAGMENTS fragments of rows, each with COLUMNS similarities and WIDTH columns of the mean. WIDTH is 0 if no mean is
// computed. Sharing is the SharingWarps of the kernel.
template <class T, int FRAGMENTS, int COLUMNS, int WIDTH, class Sharing>
struct Softmax {
  static constexpr bool MEAN = WIDTH > 0, FLOAT16 = std::is_same<T, FP16>::value;
  using Similarities = float[FRAGMENTS][COLUMNS / 2];  // of every 8 columns, two of one row and two of the other row
  using Mean = float[FRAGMENTS][MEAN ? WIDTH / 2 : 1];
  using Operand = uint32_t[FRAGMENTS][COLUMNS / 16][4];  // p in the layout of the second product's operand

  const Forward& in;
  const Sharing sharing;
  const int first;   // the warp's first row
  const int column;  // the warp's first similarity in a tile
  const int lane = threadIdx.x % 32;
  float c[FRAGMENTS][2];  // scales
  float shift[FRAGMENTS][2], total[FRAGMENTS][2], divisor[FRAGMENTS][2];  // total and divisor: this lane's partial sums
  const int used;        // rows of the queue
  const int lane_index;  // the queue row that the warp's row number `lane` excludes by its index, for `needs_mask`

  __device__ Softmax(const Forward& in, int block_row, const Sharing& sharing)
      : in(in),
        sharing(sharing),
        first(block_row + sharing.top),
        column(sharing.part * COLUMNS),
        used(in.rows_in_use()),
        lane_index(lane < 16 * FRAGMENTS && !in.queue_ids ? static_cast<int>(id(first + lane)) : -1) {
    static_assert(16 * FRAGMENTS <= 32, "a warp has no more rows than lanes");
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) c[f][h] = load_scale(row(f, h) < in.num_first ? in.scale_first : in.scale_second);
  }

  // Returns the row of x of half h of fragment f.
  __device__ int row(int f, int h) const { return first + 16 * f + 8 * h + lane / 4; }

  // Returns a row's id, or -1.
  __device__ int64_t id(int row) const { return in.ids && row < in.rows ? in.ids[row] : -1; }

  template <bool ONLINE>
  __device__ void start() {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        shift[f][h] = ONLINE ? -FLT_MAX : 0;
        total[f][h] = divisor[f][h] = 0;
      }
  }

  // Returns whether the tile of `size` rows from `start` on reaches beyond the queue, or may hold a row that this warp
  // excludes.
  __device__ bool needs_mask(int start, int size) const {
    if (start + size > used || in.queue_ids) return true;
    return in.ids && __any_sync(~0u, static_cast<unsigned>(lane_index - start) < static_cast<unsigned>(size));
  }

  // Sets these entries to -inf.
  __device__ void mask(int start, Similarities& s) const {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int64_t own = id(row(f, h));  // Loaded again, because few tiles need a mask.
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int j = start + column + 8 * n + lane % 4 * 2 + e;
            const bool out = j >= used || (own >= 0 && own == (in.queue_ids ? in.queue_ids[j] : j));
            if (out) s[f][4 * n + 2 * h + e] = -INFINITY;
          }
      }
  }

  // Raises the shift of each row whose maximum has grown too much, and sets the factor by which to multiply a mean
  // that was summed under the previous shift. Returns whether the shift of any of this warp's rows has changed.
  __device__ bool follow_maximum(const Similarities& s, float (&factor)[FRAGMENTS][2]) {
    float top[FRAGMENTS][2];
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float x = -FLT_MAX;
#pragma unroll
        for (int n = 0; n < COLUMNS / 2; n += 4) x = fmaxf(x, fmaxf(s[f][n + 2 * h], s[f][n + 2 * h + 1]));
        top[f][h] = quad_max(x);
      }
    sharing.share(top, [](float a, float b) { return fmaxf(a, b); });
    bool moved = false;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const bool grown = (top[f][h] - shift[f][h]) * c[f][h] > LAZY;
        const float next = grown ? top[f][h] : shift[f][h];
        factor[f][h] = exp2_approx((shift[f][h] - next) * c[f][h]);
        shift[f][h] = next;
        total[f][h] *= factor[f][h];
        divisor[f][h] *= factor[f][h];
        moved = moved || grown;
      }
    return __any_sync(~0u, moved);
  }

  __device__ static void rescale(Mean& mean, const float (&factor)[FRAGMENTS][2]) {
    if constexpr (MEAN) {
#pragma unroll
      for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int d = 0; d < WIDTH / 2; d++) mean[f][d] *= factor[f][d % 4 / 2];
    }
  }

  // Replaces s by p = 2^(c (s - shift)). Each tile is summed separately first, because a split has thousands of terms.
  template <bool ONLINE>
  __device__ void exponentials(Similarities& s) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
      float sum[2] = {};
#pragma unroll
      for (int n = 0; n < COLUMNS / 2; n++) {
        const int h = n % 4 / 2;
        float& x = s[f][n];
        x = exp2_approx(ONLINE ? (x - shift[f][h]) * c[f][h] + (FLOAT16 ? 7 : 0) : x * c[f][h]);
        sum[h] += x;
      }
      total[f][0] += sum[0];
      total[f][1] += sum[1];
    }
  }

  // Rounds p to the operand of the mean's product, and adds the rounded values to the divisor.
  __device__ void round(const Similarities& s, Operand& p) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
      float sum[2] = {};
#pragma unroll
      for (int n = 0; n < COLUMNS / 4; n++) {
        const uint32_t pair = pack<T>(s[f][2 * n], s[f][2 * n + 1]);
        sum[n % 2] += unpack_low<T>(pair) + unpack_high<T>(pair);
        p[f][n / 4][n % 4] = pair;
      }
      divisor[f][0] += sum[0];
      divisor[f][1] += sum[1];
    }
  }

  // Sums over the lanes of each row, and over the warps that share it.
  __device__ void finish() {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        total[f][h] = quad_sum(total[f][h]);
        if (MEAN) divisor[f][h] = quad_sum(divisor[f][h]);
      }
    const auto add = [](float a, float b) { return a + b; };
    sharing.share(total, add);
    if (MEAN) sharing.share(divisor, add);
  }

  // Returns whether the shift 0 was exact for this lane's rows: the terms below 2^-126 amount to less than an ulp of
  // the sum, and no value is close to infinity. Returns false for NaN.
  __device__ bool exact(const Mean& mean) const {
    bool good = true;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float sum = total[f][h];
        if (MEAN) {
#pragma unroll
          for (int d = 2 * h; d < WIDTH / 2; d += 4)  // Adds 0, or NaN if a value is infinite or NaN.
            sum += mean[f][d] - mean[f][d] + (mean[f][d + 1] - mean[f][d + 1]);
        }
        good = good && sum >= in.size * 0x1p-102f && sum <= 0x1p100f;
      }
    return good;
  }

  // Writes the results of the split blockIdx.y: this warp's columns of the mean, and in one of the sharing warps the
  // rest.
  __device__ void store(const Mean& mean, int dim) const {
    const int64_t plane = static_cast<int64_t>(gridDim.y) * in.rows;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if (row(f, h) >= in.rows) continue;
        const int64_t at = static_cast<int64_t>(blockIdx.y) * in.rows + row(f, h);
        if (sharing.part == 0 && lane % 4 == 0) {
          in.stats[at] = shift[f][h];
          in.stats[plane + at] = total[f][h] * (FLOAT16 ? 0x1p-7f : 1);
          if (MEAN) in.stats[2 * plane + at] = divisor[f][h];  // multiplied by 2^7, as the mean is
        }
        if (MEAN) {
#pragma unroll
          for (int d = 0; d < WIDTH / 8; d++) {
            float2* to = reinterpret_cast<float2*>(in.means + at * dim + sharing.part * WIDTH + 8 * d + lane % 4 * 2);
            *to = {mean[f][4 * d + 2 * h], mean[f][4 * d + 2 * h + 1]};
          }
        }
      }
  }
};

}  // namespace relssl
