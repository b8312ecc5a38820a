// The softmax of the rows that a warp holds, as it grows tile by tile: what every lookup does between its products.
//
// The exponent's reference is 0 as long as that is exact, which is looked at afterwards (`exact`); then the block
// starts over ONLINE, with a running maximum that moves only when it has grown by more than 2^LAZY. float16 starts
// there, and has its p raised by 2^7, as far as the largest goes without overflow: what lies 2^-31 below it counts.
//
// In registers, as tensor cores leave them: a fragment is 16 rows, of which a lane has rows lane / 4 and lane / 4 + 8,
// and of every 8 columns two.

#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "lookup.h"
#include "ptx.h"
#include "scale.h"

namespace relssl {

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

// F fragments; COLUMNS of similarities and WIDTH of the mean, or 0 where it is not wanted. SHARING warps have the same
// rows, each with its own columns.
template <class T, int F, int COLUMNS, int WIDTH, int SHARING>
struct Softmax {
  static constexpr bool MEAN = WIDTH > 0, SHIFTED = std::is_same<T, FP16>::value;
  using Similarities = float[F][COLUMNS / 2];  // of every 8 columns, two of the one row and two of the other
  using Mean = float[F][MEAN ? WIDTH / 2 : 1];
  using Operand = uint32_t[F][COLUMNS / 16][4];  // p as the second product takes it

  const Lookup& in;
  const int first;   // the warp's first row
  const int column;  // the warp's first similarity in a tile
  const int lane = threadIdx.x % 32;
  float c[F][2], reference[F][2], total[F][2], divisor[F][2];  // total and divisor: this lane's share
  const int of_lane;  // what the warp's row number `lane` leaves out, held for every tile's question whether any does

  __device__ Softmax(const Lookup& in, int first, int column)
      : in(in), first(first), column(column), of_lane(lane < 16 * F ? excluded(first + lane) : -1) {
    static_assert(16 * F <= 32, "a warp has no more rows than lanes");
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) c[f][h] = load_scale(row(f, h) < in.split ? in.scale_first : in.scale_second);
  }

  // Half h of fragment f, as a row of x.
  __device__ int row(int f, int h) const { return first + 16 * f + 8 * h + lane / 4; }

  // The queue row that a row leaves out, or -1. (What is out of range is no concern here: it has been looked at.)
  __device__ int excluded(int row) const {
    return in.exclude && row < in.rows ? static_cast<int>(in.exclude[row]) : -1;
  }

  template <bool ONLINE>
  __device__ void start() {
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        reference[f][h] = ONLINE ? -FLT_MAX : 0;
        total[f][h] = divisor[f][h] = 0;
      }
  }

  // Whether anything in the tile of `size` rows from `start` on is beyond the queue, or left out by this warp's rows.
  __device__ bool to_be_masked(int start, int size) const {
    if (start + size > in.size) return true;
    return in.exclude && __any_sync(~0u, static_cast<unsigned>(of_lane - start) < static_cast<unsigned>(size));
  }

  // These entries become -inf.
  __device__ void mask(int start, Similarities& s) const {
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int left_out = excluded(row(f, h));  // loaded again: few tiles come here
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int j = start + column + 8 * n + lane % 4 * 2 + e;
            if (j >= in.size || j == left_out) s[f][4 * n + 2 * h + e] = -INFINITY;
          }
      }
  }

  // Move the reference of a row whose maximum has grown too far, and say by what to multiply a mean summed under the
  // last one: whether any of this warp's has moved. `share` makes one maximum of those of the warps that share rows.
  template <class Share>
  __device__ bool follow_maximum(const Similarities& s, float (&factor)[F][2], Share share) {
    float most[F][2];
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float x = -FLT_MAX;
#pragma unroll
        for (int n = 0; n < COLUMNS / 2; n += 4) x = fmaxf(x, fmaxf(s[f][n + 2 * h], s[f][n + 2 * h + 1]));
        most[f][h] = max_of_quad(x);
      }
    share(most);
    bool moved = false;
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const bool grown = (most[f][h] - reference[f][h]) * c[f][h] > LAZY;
        const float next = grown ? most[f][h] : reference[f][h];
        factor[f][h] = exp2_approx((reference[f][h] - next) * c[f][h]);
        reference[f][h] = next;
        total[f][h] *= factor[f][h];
        divisor[f][h] *= factor[f][h];
        moved = moved || grown;
      }
    return __any_sync(~0u, moved);
  }

  __device__ static void rescale(Mean& mean, const float (&factor)[F][2]) {
    if constexpr (MEAN) {
#pragma unroll
      for (int f = 0; f < F; f++)
#pragma unroll
        for (int d = 0; d < WIDTH / 2; d++) mean[f][d] *= factor[f][d % 4 / 2];
    }
  }

  // s becomes p = 2^(c (s - reference)). Tiles are summed by themselves first: a split has thousands of terms.
  template <bool ONLINE>
  __device__ void exponentials(Similarities& s) {
#pragma unroll
    for (int f = 0; f < F; f++) {
      float sum[2] = {};
#pragma unroll
      for (int n = 0; n < COLUMNS / 2; n++) {
        const int h = n % 4 / 2;
        float& x = s[f][n];
        x = exp2_approx(ONLINE ? (x - reference[f][h]) * c[f][h] + (SHIFTED ? 7 : 0) : x * c[f][h]);
        sum[h] += x;
      }
      total[f][0] += sum[0];
      total[f][1] += sum[1];
    }
  }

  // p rounded: the operand of the mean, and the sum of what it holds.
  __device__ void round(const Similarities& s, Operand& p) {
#pragma unroll
    for (int f = 0; f < F; f++) {
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

  // The sums of a row over its lanes, and by `share` over the warps that share it.
  template <class Share>
  __device__ void finish(Share share) {
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        total[f][h] = sum_of_quad(total[f][h]);
        if (MEAN) divisor[f][h] = sum_of_quad(divisor[f][h]);
      }
    share(total);
    if (MEAN) share(divisor);
  }

  // Whether the reference 0 served this lane's rows: what sank below 2^-126 is less than an ulp of the sum, and
  // nothing came near infinity. NaN fails.
  __device__ bool exact(const Mean& mean) const {
    bool good = true;
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float seen = total[f][h];
        if (MEAN) {
#pragma unroll
          for (int d = 2 * h; d < WIDTH / 2; d += 4)  // add 0 or NaN
            seen += mean[f][d] - mean[f][d] + (mean[f][d + 1] - mean[f][d + 1]);
        }
        good = good && seen >= in.size * 0x1p-102f && seen <= 0x1p100f;
      }
    return good;
  }

  // Into the split blockIdx.y; the mean's columns from `column_of_mean` on, and by one of the sharing warps the rest.
  __device__ void store(const Mean& mean, int dim, int column_of_mean, bool leading) const {
    const int64_t plane = static_cast<int64_t>(gridDim.y) * in.rows;
#pragma unroll
    for (int f = 0; f < F; f++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if (row(f, h) >= in.rows) continue;
        const int64_t at = static_cast<int64_t>(blockIdx.y) * in.rows + row(f, h);
        if (leading && lane % 4 == 0) {
          in.stats[at] = reference[f][h];
          in.stats[plane + at] = total[f][h] * (SHIFTED ? 0x1p-7f : 1);
          if (MEAN) in.stats[2 * plane + at] = divisor[f][h];  // raised, as the mean is
        }
        if (MEAN) {
#pragma unroll
          for (int d = 0; d < WIDTH / 8; d++) {
            float2* to = reinterpret_cast<float2*>(in.means + at * dim + column_of_mean + 8 * d + lane % 4 * 2);
            *to = {mean[f][4 * d + 2 * h], mean[f][4 * d + 2 * h + 1]};
          }
        }
      }
  }
};

}  // namespace relssl
