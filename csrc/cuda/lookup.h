// What a lookup takes and gives, and into what tiles each kernel cuts it.

#pragma once

#include <cstdint>

#include "launch.h"

namespace relssl {

// 1 / temperature. By value it comes in units of log 2 and at least FLT_MIN; on the device, as it is.
struct Scale {
  float value;
  const float* address;  // or null
};

// bfloat16 or float16 rows in rows of 16-byte pieces; strides are in elements. The rows of x are `split` of the
// first stack, then those of the second. Each split of the queue has `step` of its rows, whole tiles.
struct Lookup {
  const uint16_t *first, *second, *queue;
  int64_t first_stride, second_stride, queue_stride;
  Scale scale_first, scale_second;
  const int64_t* exclude;  // for each row of x the queue row it leaves out; or null
  int split, rows, size, step;
  // For each split and row: reference, sum and divisor [3, splits, rows]; and sum_j p_j m_j [splits, rows, D].
  // divisor and means are written only by kernels with MEAN.
  float *stats, *means;

  // Where row r of x lies, or null beyond the last.
  __device__ const uint16_t* row_of_x(int r) const {
    if (r >= rows) return nullptr;
    return r < split ? first + r * first_stride : second + (r - split) * second_stride;
  }
};

// The one table of tiles: rows of x and of the queue in a block's tile, warps that compute, queue tiles in flight,
// warps that share their rows (each then has its own columns), and blocks to a multiprocessor. What fits the
// registers was read off the compiler's report (docs/cuda.md); what is fastest awaits a measurement.
struct Tiles {
  int m, n, warps, stages, sharing, blocks;
};

constexpr Tiles tiles_sm80(int dim) {
  switch (dim) {
    case 64: return {128, 64, 4, 3, 1, 2};
    case 128: return {128, 32, 4, 4, 1, 2};
    case 256: return {128, 64, 8, 2, 1, 1};
    case 512: return {64, 32, 8, 2, 2, 1};
    default: return {};
  }
}

// Shared memory in bytes: x, the queue's tiles, and, between warps that share rows, p and a number for each row.
constexpr int shared_sm80(int dim) {
  const Tiles t = tiles_sm80(dim);
  return 2 * dim * (t.m + t.stages * t.n) + (t.sharing > 1 ? 2 * t.m * t.n + 4 * t.sharing * t.m : 0);
}

constexpr Tiles tiles_sm90(int dim) {
  switch (dim) {
    case 64: return {128, 128, 8, 4, 1, 1};
    case 128: return {128, 128, 8, 4, 1, 1};
    case 256: return {128, 64, 8, 4, 1, 1};
    case 512: return {64, 64, 8, 2, 2, 1};
    default: return {};
  }
}

// x, the queue's tiles, two buffers of p and a number for each row between warps that share rows, and mbarriers.
constexpr int shared_sm90(int dim) {
  const Tiles t = tiles_sm90(dim);
  return 2 * dim * (t.m + t.stages * t.n) + (t.sharing > 1 ? 2 * 2 * t.m * t.n + 4 * t.sharing * t.m : 0) + 16 * t.stages;
}

// Defined for each width in an object file of its own.
template <int D>
void lookup_sm80(const Lookup&, bool bf16, bool mean, int splits, const Where&);

template <int D>
void lookup_sm90(const Lookup&, bool bf16, bool mean, int splits, const Where&);

}  // namespace relssl
