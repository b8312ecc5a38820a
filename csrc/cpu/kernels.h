// The interface of the kernels: one table of functions, which kernels.cpp defines once for each instruction set.
//
// A kernel computes similarities, softmax and mean of a block of rows with a range of the queue. Blocks are
// independent: losses.cpp distributes them over threads and merges their results.

#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

namespace relssl {

// Embedding rows with the same scale: theta_r = scale * x_r. All strides are in elements.
struct Stack {
  const void* data = nullptr;
  int64_t stride = 0;
  int64_t count = 0;
  double scale = 0;
};

// All rows are float32, or bfloat16 if `bf16`. The rows of x are those of the first stack, then those of the second.
struct Inputs {
  Stack stacks[2];
  const void* queue;
  int64_t queue_stride, size, dim;
  bool bf16;
  const int64_t* ids;        // of the rows of x, or null: a row excludes the queue rows of its id, if not negative
  const int64_t* queue_ids;  // of the queue rows, or null: their indices
  // For all rows in panels, [panels, size, panel], or null: `forward` writes the similarities here, and `backward_x`
  // takes them from here instead of computing them again, and overwrites them.
  float* similarities = nullptr;
};

// The functions below are static for the reason given in vector.h.
static inline float from_bf16(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float element(const void* row, int64_t d, bool bf16) {
  return bf16 ? from_bf16(static_cast<const uint16_t*>(row)[d]) : static_cast<const float*>(row)[d];
}

static inline const void* row_address(const Stack& stack, int64_t row, bool bf16) {
  return static_cast<const char*>(stack.data) + row * stack.stride * (bf16 ? 2 : 4);
}

static inline int64_t all_rows(const Inputs& in) { return in.stacks[0].count + in.stacks[1].count; }

// Returns the factor by which the kernels multiply similarities: the scale in units of log 2, rounded to float, and
// never 0, because an excluded queue row has the similarity -infinity.
static inline float log2_scale(double scale) {
  const float rounded = static_cast<float>(scale * 1.4426950408889634074);
  return rounded < FLT_MIN ? FLT_MIN : rounded;
}

struct Block {
  int64_t row, rows;     // of x
  int64_t first, last;   // of the queue
};

// The results of each row with one range of the queue: sum_j 2^(logit_j - shift), with logits in units of log 2, and
// the mean of the queue rows under that softmax. If all rows of the range are excluded, the sum and the mean are 0.
struct Partial {
  double* shift;   // [rows]
  double* sum;     // [rows]
  float* mean[2];  // [count, dim] of each stack, or null if it is not needed
};

// The inputs of a vector-Jacobian product with weights w_rj = p_rj (base_r + <m_j, g_mean_r>) and
// p_rj = 2^((<m_j, x_r> - high_r) scale - low_r): lse = high * scale + low, in units of log 2. If `symmetric`, the
// queue is x itself and w_rj = p_rj base_r + p_jr base_j.
struct Cotangents {
  const float *high, *low;  // [rows]
  const float* base;        // [rows]
  const float* g_mean;      // [rows, dim] or null: zero
  const float* g_row;       // [rows, dim] or null: zero
  bool symmetric = false;   // needs a null g_mean
};

struct Kernels {
  const char* name;
  int64_t panel;  // rows that are computed together: the size of a block should be a multiple of it

  // Returns the bytes of scratch memory, aligned to 64 bytes, for a block of `rows` rows.
  int64_t (*forward_scratch)(const Inputs&, int64_t rows);
  void (*forward)(const Inputs&, const Block&, const Partial&, char* scratch);

  // Computes total_r = sum_j w_rj [rows] and weighted_r = sum_j w_rj m_j [rows, dim] for the rows of the block.
  int64_t (*backward_x_scratch)(const Inputs&, const Cotangents&, int64_t rows);
  void (*backward_x)(const Inputs&, const Cotangents&, const Block&, double* total, float* weighted, char* scratch);

  // Computes grad_queue_j = sum_r w_rj theta_r + p_rj g_row_r [size, dim] for a range of the queue. backward_queue_pack
  // packs all rows of x once, before, into memory that all ranges read.
  int64_t (*backward_queue_shared)(const Inputs&, const Cotangents&);
  void (*backward_queue_pack)(const Inputs&, const Cotangents&, char* shared);
  int64_t (*backward_queue_scratch)(const Inputs&);
  void (*backward_queue)(const Inputs&, const Cotangents&, int64_t first, int64_t last, const char* shared,
                         float* grad_queue, char* scratch);

  void (*exp2)(const float* x, float* y, int64_t n);  // for tests
  double (*peak)(int64_t repeats);  // runs rounds of multiply-adds in registers and returns their flop, for benchmarks
};

}  // namespace relssl
