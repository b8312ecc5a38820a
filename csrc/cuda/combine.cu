// Merges the splits in a fixed order, with one block per row, and computes the losses (kernels/combine.py is the same
// in Triton).
//
//   splits   one warp for each merged row, for the teacher's and the student's at the same time, reads three numbers of
//            each split and computes the split's weight
//   means    a block has as many threads as columns. Each of four groups of threads reads every fourth split. A thread
//            reads four columns, and issues the loads of eight splits of each row before it adds the first. The latency
//            of the loads bounds this step, not their number: 128 splits take five round trips
//   columns  then each thread adds the groups' sums of one column and writes it
//
// Everything that is computed once per row is in float64: a loss is the small difference of large numbers, and a
// log-sum-exp rounded to one float32 would pass its rounding on to every p = exp(logit - lse) of a backward pass. Hence
// lse is stored in two parts.
//
// These kernels have not run on a GPU yet; tests/test_cuda.py runs them on a CPU.

#include "combine.h"

#include <cfloat>
#include <cmath>
#include <cstddef>

#include "ptx.h"
#include "scale.h"

namespace relssl {
namespace {

constexpr double LN2 = 0.6931471805599453;
constexpr int GROUPS = 4;     // of threads, which divide the splits among them
constexpr int IN_FLIGHT = 8;  // loads of a row's partial means that a thread issues before it waits for one

// Returns the number of round trips to memory: one for the splits' numbers, the others for their means.
constexpr int round_trips(int num_splits) { return 1 + (num_splits + GROUPS * IN_FLIGHT - 1) / (GROUPS * IN_FLIGHT); }
static_assert(round_trips(128) <= 8, "latency bounds this step");

struct Shared {
  double lse[2];                            // of two rows, in units of log 2
  double warp_sums[2][MAX_DIM / 32];        // two sums of each warp
  float sigma;
  float weights[2][MAX_SPLITS];             // of the splits of two rows, 0 beyond the last split
  float4 means[2 * GROUPS * (MAX_DIM / 4)];  // [row, group, dim / 4], only the part that dim needs
};

constexpr int shared_bytes(int dim) { return offsetof(Shared, means) + sizeof(float) * 2 * GROUPS * dim; }

// One row of a forward kernel's results, and its scale.
struct Row {
  const Partials& in;
  int index;
  float scale;
};

// Computes, in one warp, a row's log-sum-exp and the weights of its splits' partial means.
__device__ void merge_splits(const Row& row, double& lse, float (&weights)[MAX_SPLITS]) {
  constexpr int EACH = MAX_SPLITS / 32;
  const Partials& in = row.in;
  const int lane = threadIdx.x % 32;
  const int64_t plane = static_cast<int64_t>(in.num_splits) * in.rows;
  float shift[EACH], sum[EACH], rounded[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int s = lane + 32 * i;
    const float* at = in.stats + static_cast<int64_t>(s) * in.rows + in.offset + row.index;
    shift[i] = s < in.num_splits ? at[0] : -FLT_MAX;
    sum[i] = s < in.num_splits ? at[plane] : 0;
    rounded[i] = s < in.num_splits && in.means ? at[2 * plane] : 0;
  }
  float top = -FLT_MAX, total = 0, divisor = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) top = fmaxf(top, shift[i]);
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const float weight = exp2f((shift[i] - top) * row.scale);
    total += weight * sum[i];
    divisor += weight * rounded[i];
    shift[i] = weight;
  }
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) {
    total += __shfl_xor_sync(~0u, total, lanes);
    divisor += __shfl_xor_sync(~0u, divisor, lanes);
  }
  const float inverse = divisor == 0 ? 1 : 1 / divisor;  // The mean of an empty row, of which all is excluded, is 0.
#pragma unroll
  for (int i = 0; i < EACH; i++) weights[lane + 32 * i] = lane + 32 * i < in.num_splits ? shift[i] * inverse : 0;
  if (lane == 0) lse = static_cast<double>(top) * row.scale + log2(static_cast<double>(total));
}

template <int ROWS>
__device__ void merge_splits(const Row (&rows)[ROWS], Shared& shared) {
#pragma unroll
  for (int r = 0; r < ROWS; r++)
    if (threadIdx.x / 32 == r) merge_splits(rows[r], shared.lse[r], shared.weights[r]);
  __syncthreads();
}

// Merges the means of the first COUNT rows; each thread gets one column of them.
template <int COUNT>
__device__ void merge_means(const Row* rows, int dim, Shared& shared, float* means) {
  const int columns = dim / 4, column = threadIdx.x % columns, group = threadIdx.x / columns;
  const float4* at[COUNT];
  int64_t stride[COUNT];
  float4 sums[COUNT] = {};
  int max_splits = 0;
#pragma unroll
  for (int r = 0; r < COUNT; r++) {
    const Partials& in = rows[r].in;
    const int64_t first = (static_cast<int64_t>(in.offset) + rows[r].index) * columns + column;
    at[r] = reinterpret_cast<const float4*>(in.means) + first;
    stride[r] = static_cast<int64_t>(in.rows) * columns;
    max_splits = in.num_splits > max_splits ? in.num_splits : max_splits;
  }
  for (int start = 0; start < max_splits; start += GROUPS * IN_FLIGHT) {
    float4 parts[COUNT][IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; i++)
#pragma unroll
      for (int r = 0; r < COUNT; r++) {
        const int s = start + GROUPS * i + group;
        parts[r][i] = s < rows[r].in.num_splits ? at[r][s * stride[r]] : float4{};
      }
    __syncwarp();  // Without it ptxas would move each load to just before its use, to save registers.
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; i++)
#pragma unroll
      for (int r = 0; r < COUNT; r++) {
        const float weight = shared.weights[r][start + GROUPS * i + group];
        sums[r].x += weight * parts[r][i].x;
        sums[r].y += weight * parts[r][i].y;
        sums[r].z += weight * parts[r][i].z;
        sums[r].w += weight * parts[r][i].w;
      }
  }
#pragma unroll
  for (int r = 0; r < COUNT; r++) shared.means[r * dim + threadIdx.x] = sums[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < COUNT; r++) {
    const float* sum = reinterpret_cast<const float*>(shared.means + r * dim) + threadIdx.x;
    means[r] = sum[0] + sum[dim] + (sum[2 * dim] + sum[3 * dim]);
  }
}

// Sums over the block's threads; only the first thread gets the sums.
template <int COUNT>
__device__ void block_sum(double (&sums)[COUNT], int threads, Shared& shared) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], lanes);
    if (threadIdx.x % 32 == 0) shared.warp_sums[i][threadIdx.x / 32] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < threads / 32; w++)
#pragma unroll
      for (int i = 0; i < COUNT; i++) sums[i] += shared.warp_sums[i][w];
}

__device__ void store_lse(double lse, float* to, int row, int rows) {
  const double natural = lse * LN2;
  const float high = static_cast<float>(natural);
  to[row] = high;
  to[rows + row] = high == -INFINITY ? 0 : static_cast<float>(natural - high);
}

__global__ void __launch_bounds__(MAX_DIM) combine_lse_and_mean(const __grid_constant__ CombineLseAndMean in) {
  Shared& shared = shared_object<Shared>();
  const int row = blockIdx.x, d = threadIdx.x;
  const Row rows[] = {{in.partials, row, load_scale(row < in.num_first ? in.scale_first : in.scale_second)}};
  merge_splits(rows, shared);
  if (d == 0) store_lse(shared.lse[0], in.lse, row, in.partials.rows);
  if (!in.mean) return;
  float mean;
  merge_means<1>(rows, in.dim, shared, &mean);
  in.mean[static_cast<int64_t>(row) * in.dim + d] = mean;
}

// Returns a row's cross-entropy with the teacher's softmax, in units of log 2; 0 for an empty row. If there are none,
// only logits below all floats have the log-sum-exp -infinity, and make the loss NaN.
__device__ double cross_entropy(double lse, float scale, double dot, bool may_be_empty) {
  return may_be_empty && lse == -INFINITY ? 0 : lse - scale * dot;
}

// loss = A(theta_s) - <theta_s, mean_t> (- H(p_t) if kl),  H(p_t) = A(theta_t) - <theta_t, mean_t>
// grad_q = weight / temperature (mean_s - mean_t)
template <class T>
__global__ void __launch_bounds__(MAX_DIM) combine_relation(const __grid_constant__ CombineRelation in) {
  Shared& shared = shared_object<Shared>();
  const int row = blockIdx.x, target = row % in.batch, dim = in.dim, d = threadIdx.x;
  const bool first = row < in.batch;  // The rows of the first view also write the teacher's results.
  const float q = unpack_low<T>(in.q[row * in.q_stride + d]), k = unpack_low<T>(in.k[target * in.k_stride + d]);
  const float c_s = load_scale(in.scale_s), c_t = load_scale(in.scale_t);
  const Row rows[] = {{in.teacher, target, c_t}, {in.student, row, c_s}};
  merge_splits(rows, shared);
  float means[2];
  if (in.grad_q) {
    merge_means<2>(rows, dim, shared, means);
    const float factor = in.weight * c_s * static_cast<float>(LN2);
    in.grad_q[static_cast<int64_t>(row) * dim + d] = factor * (means[1] - means[0]);
  } else {
    merge_means<1>(rows, dim, shared, means);
  }
  if (first) in.mean_t[static_cast<int64_t>(target) * dim + d] = means[0];
  double dots[] = {static_cast<double>(q) * means[0], static_cast<double>(k) * means[0]};
  block_sum(dots, dim, shared);
  if (d) return;
  const double entropy = cross_entropy(shared.lse[0], c_t, dots[1], in.may_be_empty);
  const double cross = cross_entropy(shared.lse[1], c_s, dots[0], in.may_be_empty);
  in.loss[row] = static_cast<float>((in.kl ? cross - entropy : cross) * LN2);
  store_lse(shared.lse[1], in.lse, in.batch + row, in.batch + in.rows);
  if (!first) return;
  in.entropy[target] = static_cast<float>(entropy * LN2);
  store_lse(shared.lse[0], in.lse, target, in.batch + in.rows);
}

// loss = log(1 + e^z),  z = A(theta) - <theta, k>,  sigma = 1 / (1 + e^-z)
// grad_q = weight / temperature sigma (mean - k)
template <class T>
__global__ void __launch_bounds__(MAX_DIM) combine_info_nce(const __grid_constant__ CombineInfoNCE in) {
  Shared& shared = shared_object<Shared>();
  const int row = blockIdx.x, target = row % in.batch, dim = in.dim, d = threadIdx.x;
  const float q = unpack_low<T>(in.q[row * in.q_stride + d]), k = unpack_low<T>(in.k[target * in.k_stride + d]);
  const float c = load_scale(in.scale);
  const Row rows[] = {{in.partials, row, c}};
  double dots[] = {static_cast<double>(q) * k};
  block_sum(dots, dim, shared);
  merge_splits(rows, shared);
  if (d == 0) {  // The other threads load means in the meantime.
    dots[0] += 0 * dots[0];  // An infinite logit becomes NaN, as in a softmax over it.
    const double z = LN2 * (shared.lse[0] - c * dots[0]), small = exp(-fabs(z));
    shared.sigma = static_cast<float>((z > 0 ? 1 : small) / (1 + small));
    in.loss[row] = static_cast<float>((z > 0 ? z : 0) + log1p(small));
    in.sigma[row] = shared.sigma;
    store_lse(shared.lse[0], in.lse, row, in.rows);
  }
  if (!in.grad_q) return;
  float mean;
  merge_means<1>(rows, dim, shared, &mean);
  const float factor = in.weight * c * static_cast<float>(LN2) * shared.sigma;
  in.grad_q[static_cast<int64_t>(row) * dim + d] = factor * (mean - k);
}

}  // namespace

void probe(int device) { require(reinterpret_cast<const void*>(combine_lse_and_mean), device); }

void combine(const CombineLseAndMean& in, const DeviceStream& on) {
  launch(combine_lse_and_mean, dim3(in.partials.rows), in.dim, shared_bytes(in.dim), on, in);
}

void combine(const CombineRelation& in, const DeviceStream& on) {
  const auto kernel = in.bf16 ? combine_relation<BF16> : combine_relation<FP16>;
  launch(kernel, dim3(in.rows), in.dim, shared_bytes(in.dim), on, in);
}

void combine(const CombineInfoNCE& in, const DeviceStream& on) {
  const auto kernel = in.bf16 ? combine_info_nce<BF16> : combine_info_nce<FP16>;
  launch(kernel, dim3(in.rows), in.dim, shared_bytes(in.dim), on, in);
}

}  // namespace relssl
