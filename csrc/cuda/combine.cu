// The splits merged in a fixed order, a block for each row, and the losses made of it (kernels/combine.py has the
// same in Triton).
//
//   splits   a warp for each row that is merged, the teacher's and the student's at the same time, has three numbers of
//            each split and gives the split its weight
//   means    a block has as many threads as columns. Four groups of them take every fourth split; a thread has four
//            columns, and asks for eight splits of each row before it adds up the first. What bounds this step is not
//            how much it reads, but how often it waits: at 128 splits, five times
//   columns  then each thread has one, of which it adds the groups' sums, and writes it
//
// What depends on a row alone is computed in float64: it is a few numbers, a loss is the small difference of large
// ones, and a log-sum-exp rounded to one float32 would carry its rounding into every p = exp(logit - lse) of a
// backward pass. Hence lse is stored in two parts.
//
// Not run on a GPU yet; tests/test_cuda.py runs it on a CPU.

#include "combine.h"

#include <cfloat>
#include <cmath>
#include <cstddef>

#include "ptx.h"
#include "scale.h"

namespace relssl {
namespace {

constexpr double LN2 = 0.6931471805599453;
constexpr int GROUPS = 4;     // of threads, among which splits are divided
constexpr int IN_FLIGHT = 8;  // loads of a row's partial means that a thread issues before it waits for one

// How often loads wait for others: for those of what splits counted, and of their means.
constexpr int rounds(int splits) { return 1 + (splits + GROUPS * IN_FLIGHT - 1) / (GROUPS * IN_FLIGHT); }
static_assert(rounds(128) <= 8, "latency bounds this step");

struct Shared {
  double lse[2];                            // of two rows, in units of log 2
  double of_warp[2][WIDEST / 32];           // two sums
  float sigma;
  float weights[2][MOST_SPLITS];            // of the splits of two rows, 0 beyond the last
  float4 means[2 * GROUPS * (WIDEST / 4)];  // [row, group, columns by four], as far as there are columns
};

constexpr int shared_bytes(int dim) { return offsetof(Shared, means) + sizeof(float) * 2 * GROUPS * dim; }

// A row of what a lookup found.
struct Row {
  const Partials& in;
  int index;
  float c;
};

// By one warp: the row's log-sum-exp, and what to weigh its splits' partial means with.
__device__ void merge_splits(const Row& row, double& lse, float (&weights)[MOST_SPLITS]) {
  constexpr int EACH = MOST_SPLITS / 32;
  const Partials& in = row.in;
  const int lane = threadIdx.x % 32;
  const int64_t plane = static_cast<int64_t>(in.splits) * in.rows;
  float reference[EACH], sum[EACH], rounded[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int s = lane + 32 * i;
    const float* at = in.stats + static_cast<int64_t>(s) * in.rows + in.offset + row.index;
    reference[i] = s < in.splits ? at[0] : -FLT_MAX;
    sum[i] = s < in.splits ? at[plane] : 0;
    rounded[i] = s < in.splits && in.means ? at[2 * plane] : 0;
  }
  float top = -FLT_MAX, total = 0, divisor = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) top = fmaxf(top, reference[i]);
#pragma unroll
  for (int apart = 16; apart; apart /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, apart));
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const float weight = exp2f((reference[i] - top) * row.c);
    total += weight * sum[i];
    divisor += weight * rounded[i];
    reference[i] = weight;
  }
#pragma unroll
  for (int apart = 16; apart; apart /= 2) {
    total += __shfl_xor_sync(~0u, total, apart);
    divisor += __shfl_xor_sync(~0u, divisor, apart);
  }
  const float share = divisor == 0 ? 1 : 1 / divisor;  // A row left with nothing has the mean 0.
#pragma unroll
  for (int i = 0; i < EACH; i++) weights[lane + 32 * i] = lane + 32 * i < in.splits ? reference[i] * share : 0;
  if (lane == 0) lse = static_cast<double>(top) * row.c + log2(static_cast<double>(total));
}

template <int ROWS>
__device__ void merge_splits(const Row (&rows)[ROWS], Shared& shared) {
#pragma unroll
  for (int r = 0; r < ROWS; r++)
    if (threadIdx.x / 32 == r) merge_splits(rows[r], shared.lse[r], shared.weights[r]);
  __syncthreads();
}

// The means of the first COUNT rows, in each thread one column of them.
template <int COUNT>
__device__ void merge_means(const Row* rows, int dim, Shared& shared, float* means) {
  const int columns = dim / 4, column = threadIdx.x % columns, group = threadIdx.x / columns;
  const float4* at[COUNT];
  int64_t stride[COUNT];
  float4 sums[COUNT] = {};
  int most = 0;
#pragma unroll
  for (int r = 0; r < COUNT; r++) {
    const Partials& in = rows[r].in;
    const int64_t first = (static_cast<int64_t>(in.offset) + rows[r].index) * columns + column;
    at[r] = reinterpret_cast<const float4*>(in.means) + first;
    stride[r] = static_cast<int64_t>(in.rows) * columns;
    most = in.splits > most ? in.splits : most;
  }
  for (int start = 0; start < most; start += GROUPS * IN_FLIGHT) {
    float4 parts[COUNT][IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; i++)
#pragma unroll
      for (int r = 0; r < COUNT; r++) {
        const int s = start + GROUPS * i + group;
        parts[r][i] = s < rows[r].in.splits ? at[r][s * stride[r]] : float4{};
      }
    __syncwarp();  // Past this ptxas moves no load: it would put each just before its use, to save registers.
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
    const float* of_group = reinterpret_cast<const float*>(shared.means + r * dim) + threadIdx.x;
    means[r] = of_group[0] + of_group[dim] + (of_group[2 * dim] + of_group[3 * dim]);
  }
}

// Over the block's threads, for the first one.
template <int COUNT>
__device__ void add_up(double (&sums)[COUNT], int threads, Shared& shared) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
#pragma unroll
    for (int apart = 16; apart; apart /= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], apart);
    if (threadIdx.x % 32 == 0) shared.of_warp[i][threadIdx.x / 32] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < threads / 32; w++)
#pragma unroll
      for (int i = 0; i < COUNT; i++) sums[i] += shared.of_warp[i][w];
}

__device__ void store_lse(double lse, float* to, int row, int rows) {
  const double natural = lse * LN2;
  const float high = static_cast<float>(natural);
  to[row] = high;
  to[rows + row] = high == -INFINITY ? 0 : static_cast<float>(natural - high);
}

__global__ void __launch_bounds__(WIDEST) combine_rows(const __grid_constant__ CombineRows in) {
  Shared& shared = shared_object<Shared>();
  const int row = blockIdx.x, d = threadIdx.x;
  const Row rows[] = {{in.partials, row, load_scale(row < in.split ? in.scale_first : in.scale_second)}};
  merge_splits(rows, shared);
  if (d == 0) store_lse(shared.lse[0], in.lse, row, in.partials.rows);
  if (!in.mean) return;
  float mean;
  merge_means<1>(rows, in.dim, shared, &mean);
  in.mean[static_cast<int64_t>(row) * in.dim + d] = mean;
}

// loss = A(theta_s) - <theta_s, mean_t> (- H(p_t) if kl),  H(p_t) = A(theta_t) - <theta_t, mean_t>
// grad_q = weight / temperature (mean_s - mean_t)
template <class T>
__global__ void __launch_bounds__(WIDEST) combine_relation(const __grid_constant__ CombineRelation in) {
  Shared& shared = shared_object<Shared>();
  const int row = blockIdx.x, own = row % in.batch, dim = in.dim, d = threadIdx.x;
  const bool first = row < in.batch;  // The first view's rows write the teacher's results, too.
  const float q = unpack_low<T>(in.q[row * in.q_stride + d]), k = unpack_low<T>(in.k[own * in.k_stride + d]);
  const float c_s = load_scale(in.scale_s), c_t = load_scale(in.scale_t);
  const Row rows[] = {{in.teacher, own, c_t}, {in.student, row, c_s}};
  merge_splits(rows, shared);
  float means[2];
  if (in.grad_q) {
    merge_means<2>(rows, dim, shared, means);
    const float factor = in.weight * c_s * static_cast<float>(LN2);
    in.grad_q[static_cast<int64_t>(row) * dim + d] = factor * (means[1] - means[0]);
  } else {
    merge_means<1>(rows, dim, shared, means);
  }
  if (first) in.mean_t[static_cast<int64_t>(own) * dim + d] = means[0];
  double along[] = {static_cast<double>(q) * means[0], static_cast<double>(k) * means[0]};
  add_up(along, dim, shared);
  if (d) return;
  const double cross = shared.lse[1] - c_s * along[0], entropy = shared.lse[0] - c_t * along[1];
  in.loss[row] = static_cast<float>((in.kl ? cross - entropy : cross) * LN2);
  store_lse(shared.lse[1], in.lse, in.batch + row, in.batch + in.rows);
  if (!first) return;
  in.entropy[own] = static_cast<float>(entropy * LN2);
  store_lse(shared.lse[0], in.lse, own, in.batch + in.rows);
}

// loss = log(1 + e^z),  z = A(theta) - <theta, k>,  sigma = 1 / (1 + e^-z)
// grad_q = weight / temperature sigma (mean - k)
template <class T>
__global__ void __launch_bounds__(WIDEST) combine_info_nce(const __grid_constant__ CombineInfoNCE in) {
  Shared& shared = shared_object<Shared>();
  const int row = blockIdx.x, own = row % in.batch, dim = in.dim, d = threadIdx.x;
  const float q = unpack_low<T>(in.q[row * in.q_stride + d]), k = unpack_low<T>(in.k[own * in.k_stride + d]);
  const float c = load_scale(in.scale);
  const Row rows[] = {{in.partials, row, c}};
  double along[] = {static_cast<double>(q) * k};
  add_up(along, dim, shared);
  merge_splits(rows, shared);
  if (d == 0) {  // while the others load means
    along[0] += 0 * along[0];  // An infinite one becomes NaN, as in a softmax with it.
    const double z = LN2 * (shared.lse[0] - c * along[0]), small = exp(-fabs(z));
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

void probe(int device) { require(reinterpret_cast<const void*>(combine_rows), device); }

void combine(const CombineRows& in, const Where& where) {
  launch(combine_rows, dim3(in.partials.rows), in.dim, shared_bytes(in.dim), where, in);
}

void combine(const CombineRelation& in, const Where& where) {
  const auto kernel = in.bf16 ? combine_relation<BF16> : combine_relation<FP16>;
  launch(kernel, dim3(in.rows), in.dim, shared_bytes(in.dim), where, in);
}

void combine(const CombineInfoNCE& in, const Where& where) {
  const auto kernel = in.bf16 ? combine_info_nce<BF16> : combine_info_nce<FP16>;
  launch(kernel, dim3(in.rows), in.dim, shared_bytes(in.dim), where, in);
}

}  // namespace relssl
