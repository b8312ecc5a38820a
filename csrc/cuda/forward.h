// The arguments and results of the forward kernels, and the tile sizes of each.

#pragma once

#include <cstdint>

#include "launch.h"

namespace relssl {

// 1 / temperature: by value in units of log 2 and at least FLT_MIN, or the unchanged number at an address on the
// device.
struct Scale {
  float value;
  const float* address;  // or null
};

// Rows are bfloat16 or float16 and consist of 16-byte chunks; strides are in elements. x is two stacks of rows: the
// first `num_first` rows are in `first`, the others in `second`. Each split of the queue has `step` rows, a whole
// number of tiles.
struct Forward {
  const uint16_t *first, *second, *queue;
  int64_t first_stride, second_stride, queue_stride;
  Scale scale_first, scale_second;
  const int64_t* ids;        // of the rows of x, or null: a row excludes the queue rows of its id, if not negative
  const int64_t* queue_ids;  // of the queue rows, or null: their indices
  const int64_t* filled;     // the number of queue rows in use, which come first, or null: all
  int num_first, rows, size, step;
  // The results of each split and row: shift, sum and divisor [3, num_splits, rows], and sum_j p_j m_j [num_splits,
  // rows, D]. Only kernels with MEAN write the divisor and the means.
  float *stats, *means;

  __device__ int rows_in_use() const { return filled && *filled < size ? static_cast<int>(*filled) : size; }

  // Returns the address of row r of x, or null beyond the last row.
  __device__ const uint16_t* row_of_x(int r) const {
    if (r >= rows) return nullptr;
    return r < num_first ? first + r * first_stride : second + (r - num_first) * second_stride;
  }
};

// The tile sizes: rows of x (m) and of the queue (n) in a block's tile, warps that compute, queue tiles in flight,
// warps that share the same rows (each computes its own columns), and blocks per multiprocessor. The compiler's
// report (docs/cuda.md) shows that they fit the registers. No measurement on a GPU has confirmed that they are the
// fastest.
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

// Returns the bytes of shared memory for x, the queue's tiles and, if warps share rows, p and one number per row and
// warp.
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

// The same for Hopper, with two buffers of p if warps share rows, and the mbarriers.
constexpr int shared_sm90(int dim) {
  const Tiles t = tiles_sm90(dim);
  return 2 * dim * (t.m + t.stages * t.n) + (t.sharing > 1 ? 2 * 2 * t.m * t.n + 4 * t.sharing * t.m : 0) + 16 * t.stages;
}

// Each width is compiled to an object file of its own.
template <int D>
void forward_sm80(const Forward&, bool bf16, bool mean, int num_splits, const DeviceStream&);

template <int D>
void forward_sm90(const Forward&, bool bf16, bool mean, int num_splits, const DeviceStream&);

}  // namespace relssl
