// The splits merged in a fixed order, a block for each row, and the losses made of it (kernels/combine.py has the
// same in Triton).
//
// What depends on a row alone is computed in float64: it is a few numbers, a loss is the small difference of large
// ones, and a log-sum-exp rounded to one float32 would carry its rounding into every p = exp(logit - lse) of a
// backward pass. Hence lse is stored in two parts.

#include "combine.h"

#include <cfloat>
#include <cmath>

#include "ptx.h"
#include "scale.h"

namespace relssl {
namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr double LN2 = 0.6931471805599453;

struct Shared {
  double of_warp[WARPS];
  float weights[2][MOST_SPLITS];  // of the splits of two rows
  float means[2][WARPS][WIDEST];  // of theirs, what each warp summed
};

// Over the block, in a fixed order, known to all.
template <class Number, class Merge>
__device__ Number reduce(Number x, Shared& shared, Merge merge) {
#pragma unroll
  for (int apart = 16; apart; apart /= 2) x = merge(x, __shfl_xor_sync(~0u, x, apart));
  __syncthreads();  // until the last reduction has been read
  if (threadIdx.x % 32 == 0) shared.of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = static_cast<Number>(shared.of_warp[0]);
#pragma unroll
  for (int w = 1; w < WARPS; w++) x = merge(x, static_cast<Number>(shared.of_warp[w]));
  return x;
}

template <class Number>
__device__ Number sum(Number x, Shared& shared) {
  return reduce(x, shared, [](Number a, Number b) { return a + b; });
}

// A row's log-sum-exp in units of log 2; its splits' partial means weighed by `weights`.
__device__ double merge(const Partials& in, int row, float c, bool mean, float* weights, Shared& shared) {
  const int64_t plane = static_cast<int64_t>(in.splits) * in.rows;
  const auto at = [&](int split) { return in.stats + static_cast<int64_t>(split) * in.rows + in.offset + row; };
  float top = -FLT_MAX, total = 0, divisor = 0;
  for (int s = threadIdx.x; s < in.splits; s += THREADS) top = fmaxf(top, *at(s));
  top = reduce(top, shared, [](float a, float b) { return fmaxf(a, b); });
  for (int s = threadIdx.x; s < in.splits; s += THREADS) {
    weights[s] = exp2f((*at(s) - top) * c);
    total += weights[s] * at(s)[plane];
    if (mean) divisor += weights[s] * at(s)[2 * plane];
  }
  total = sum(total, shared);
  if (mean) {
    divisor = sum(divisor, shared);
    if (divisor == 0) divisor = 1;  // A row left with nothing has the mean 0.
    for (int s = threadIdx.x; s < in.splits; s += THREADS) weights[s] /= divisor;
  }
  return static_cast<double>(top) * c + log2(static_cast<double>(total));
}

// The mean of a row into means[0]: each warp sums every fourth split, then the warps' sums are added.
__device__ void merge_mean(const Partials& in, int row, int dim, const float* weights, float (&means)[WARPS][WIDEST]) {
  const int warp = threadIdx.x / 32;
  __syncthreads();  // until the weights are there, and the last mean has been read
  for (int d = threadIdx.x % 32; d < dim; d += 32) {
    const float* at = in.means + (static_cast<int64_t>(in.offset) + row) * dim + d;
    const int64_t stride = static_cast<int64_t>(in.rows) * dim;
    float mean = 0;
#pragma unroll 8
    for (int s = warp; s < in.splits; s += WARPS) mean += weights[s] * at[s * stride];
    means[warp][d] = mean;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < dim; d += THREADS)
    means[0][d] = means[0][d] + means[1][d] + (means[2][d] + means[3][d]);
}

__device__ void store_lse(double lse, float* to, int row, int rows) {
  if (threadIdx.x) return;
  const double natural = lse * LN2;
  const float high = static_cast<float>(natural);
  to[row] = high;
  to[rows + row] = high == -INFINITY ? 0 : static_cast<float>(natural - high);
}

__global__ void __launch_bounds__(THREADS) combine_rows(const __grid_constant__ CombineRows in) {
  Shared& shared = shared_object<Shared>();
  const int row = blockIdx.x, dim = in.dim;
  const float c = load_scale(row < in.split ? in.scale_first : in.scale_second);
  const double lse = merge(in.partials, row, c, in.mean, shared.weights[0], shared);
  store_lse(lse, in.lse, row, in.partials.rows);
  if (!in.mean) return;
  merge_mean(in.partials, row, dim, shared.weights[0], shared.means[0]);
  for (int d = threadIdx.x; d < dim; d += THREADS)
    in.mean[static_cast<int64_t>(row) * dim + d] = shared.means[0][0][d];
}

// loss = A(theta_s) - <theta_s, mean_t> (- H(p_t) if kl),  H(p_t) = A(theta_t) - <theta_t, mean_t>
// grad_q = weight / temperature (mean_s - mean_t)
template <class T>
__global__ void __launch_bounds__(THREADS) combine_relation(const __grid_constant__ CombineRelation in) {
  Shared& shared = shared_object<Shared>();
  const int row = blockIdx.x, own = row % in.batch, dim = in.dim;
  const bool first = row < in.batch;  // The first view's rows write the teacher's results, too.
  const float c_s = load_scale(in.scale_s), c_t = load_scale(in.scale_t);
  const double lse_t = merge(in.teacher, own, c_t, true, shared.weights[0], shared);
  const double lse_s = merge(in.student, row, c_s, in.grad_q, shared.weights[1], shared);
  merge_mean(in.teacher, own, dim, shared.weights[0], shared.means[0]);
  if (in.grad_q) merge_mean(in.student, row, dim, shared.weights[1], shared.means[1]);
  const uint16_t *q = in.q + row * in.q_stride, *k = in.k + own * in.k_stride;
  const float *mean_t = shared.means[0][0], *mean_s = shared.means[1][0];
  const float factor = in.weight * c_s * static_cast<float>(LN2);
  double along_s = 0, along_t = 0;
  for (int d = threadIdx.x; d < dim; d += THREADS) {
    along_s += static_cast<double>(unpack_low<T>(q[d])) * mean_t[d];
    along_t += static_cast<double>(unpack_low<T>(k[d])) * mean_t[d];
    if (in.grad_q) in.grad_q[static_cast<int64_t>(row) * dim + d] = factor * (mean_s[d] - mean_t[d]);
    if (first) in.mean_t[static_cast<int64_t>(own) * dim + d] = mean_t[d];
  }
  const double entropy = lse_t - c_t * sum(along_t, shared);
  const double cross = lse_s - c_s * sum(along_s, shared);
  store_lse(lse_s, in.lse, in.batch + row, in.batch + in.rows);
  if (first) store_lse(lse_t, in.lse, own, in.batch + in.rows);
  if (threadIdx.x) return;
  in.loss[row] = static_cast<float>((in.kl ? cross - entropy : cross) * LN2);
  if (first) in.entropy[own] = static_cast<float>(entropy * LN2);
}

// loss = log(1 + e^z),  z = A(theta) - <theta, k>,  sigma = 1 / (1 + e^-z)
// grad_q = weight / temperature sigma (mean - k)
template <class T>
__global__ void __launch_bounds__(THREADS) combine_info_nce(const __grid_constant__ CombineInfoNCE in) {
  Shared& shared = shared_object<Shared>();
  const int row = blockIdx.x, own = row % in.batch, dim = in.dim;
  const float c = load_scale(in.scale);
  const double lse = merge(in.partials, row, c, in.grad_q, shared.weights[0], shared);
  store_lse(lse, in.lse, row, in.rows);
  const uint16_t *q = in.q + row * in.q_stride, *k = in.k + own * in.k_stride;
  double along = 0;
  for (int d = threadIdx.x; d < dim; d += THREADS)
    along += static_cast<double>(unpack_low<T>(q[d])) * unpack_low<T>(k[d]);
  along = sum(along, shared);
  along += 0 * along;  // An infinite one becomes NaN, as in a softmax with it.
  const double z = LN2 * (lse - c * along), small = exp(-fabs(z));
  const float sigma = static_cast<float>((z > 0 ? 1 : small) / (1 + small));
  if (threadIdx.x == 0) {
    in.loss[row] = static_cast<float>((z > 0 ? z : 0) + log1p(small));
    in.sigma[row] = sigma;
  }
  if (!in.grad_q) return;
  const float factor = in.weight * c * static_cast<float>(LN2) * sigma;
  merge_mean(in.partials, row, dim, shared.weights[0], shared.means[0]);
  for (int d = threadIdx.x; d < dim; d += THREADS)
    in.grad_q[static_cast<int64_t>(row) * dim + d] = factor * (shared.means[0][0][d] - unpack_low<T>(k[d]));
}

}  // namespace

void probe(int device) { require(reinterpret_cast<const void*>(combine_rows), device); }

void combine(const CombineRows& in, const Where& where) {
  launch(combine_rows, dim3(in.partials.rows), THREADS, sizeof(Shared), where, in);
}

void combine(const CombineRelation& in, const Where& where) {
  launch(in.bf16 ? combine_relation<BF16> : combine_relation<FP16>, dim3(in.rows), THREADS, sizeof(Shared), where, in);
}

void combine(const CombineInfoNCE& in, const Where& where) {
  launch(in.bf16 ? combine_info_nce<BF16> : combine_info_nce<FP16>, dim3(in.rows), THREADS, sizeof(Shared), where, in);
}

}  // namespace relssl
