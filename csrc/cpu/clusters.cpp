#include "clusters.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

namespace relssl {
namespace {

constexpr double kEmpty = 1e-8;   // the length of a column below which its cluster is empty
constexpr int64_t kSummed = 64;  // products that are added in float

// Returns log M less the entropy of the clusters' shares, and adds its gradient for an image's assignments to `grad`.
double penalty(const double* sizes, int64_t clusters, double* grad) {
  double total = 0, sum = 0;
  for (int64_t m = 0; m < clusters; ++m) total += sizes[m];
  for (int64_t m = 0; m < clusters; ++m) {
    const double share = sizes[m] / total, least = FLT_MIN;  // 0 log 0 is 0, but its gradient is not finite.
    const double logarithm = std::log(std::max(share, least));
    sum += share * logarithm;
    grad[m] += (logarithm + (share >= least)) / total;
  }
  for (int64_t m = 0; m < clusters; ++m) grad[m] -= (sum + 1) / total;
  return std::log(static_cast<double>(clusters)) + sum;
}

}  // namespace

void cluster_loss(const float* const p[2], int64_t count, int64_t clusters, double scale, bool penalize, float* loss,
                  float* grad, float* radial) {
  const int64_t both = 2 * clusters;
  std::vector<double> squares(both), sizes(both);
  for (int view = 0; view < 2; ++view)
    for (int64_t n = 0; n < count; ++n)
      for (int64_t m = 0; m < clusters; ++m) {
        const double share = p[view][n * clusters + m];
        squares[view * clusters + m] += share * share;
        sizes[view * clusters + m] += share;
      }

  std::vector<float> inverse(both), unit(count * both);  // unit columns, image by image
  for (int64_t i = 0; i < both; ++i) {
    const double norm = std::sqrt(squares[i]);
    inverse[i] = norm < kEmpty ? 1.0f : static_cast<float>(1 / norm);
  }
  for (int64_t n = 0; n < count; ++n)
    for (int view = 0; view < 2; ++view)
      for (int64_t m = 0; m < clusters; ++m) {
        const int64_t i = view * clusters + m;
        unit[n * both + i] = p[view][n * clusters + m] * inverse[i];
      }

  std::vector<double> cosine(both * both);
  std::vector<float> part(both * both);
  for (int64_t first = 0; first < count; first += kSummed) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (int64_t n = first; n < std::min(count, first + kSummed); ++n)
      for (int64_t i = 0; i < both; ++i)
        for (int64_t j = 0; j < both; ++j) part[i * both + j] += unit[n * both + i] * unit[n * both + j];
    for (int64_t k = 0; k < both * both; ++k) cosine[k] += part[k];
  }

  // NT-Xent, and the softmax of each column's logits without its own.
  std::vector<float>& softmax = part;
  double sum = 0;
  for (int64_t i = 0; i < both; ++i) {
    const double* row = &cosine[i * both];
    float* to = &softmax[i * both];
    double top = -INFINITY, total = 0;
    for (int64_t j = 0; j < both; ++j)
      if (j != i) top = std::max(top, row[j]);
    for (int64_t j = 0; j < both; ++j) {
      to[j] = j == i ? 0.0f : std::exp(static_cast<float>(scale * (row[j] - top)));
      total += to[j];
    }
    for (int64_t j = 0; j < both; ++j) to[j] = static_cast<float>(to[j] / total);
    sum += std::log(total) + scale * (top - row[(i + clusters) % both]);
  }
  double value = sum / both;
  std::vector<double> of_penalty(both);
  if (penalize)
    for (int view = 0; view < 2; ++view)
      value += penalty(&sizes[view * clusters], clusters, &of_penalty[view * clusters]);
  *loss = static_cast<float>(value);
  if (!grad) return;

  // The gradient of column i is sum_j weight_ji unit_j; its part along unit_i vanishes.
  std::vector<float> weight(both * both), row(both);
  for (int64_t i = 0; i < both; ++i) {
    double along = 0;
    for (int64_t j = 0; j < both; ++j) {
      double w = static_cast<double>(softmax[i * both + j]) + softmax[j * both + i];
      if (j == (i + clusters) % both) w -= 2;
      w *= scale / both;
      along += w * cosine[i * both + j];
      weight[j * both + i] = static_cast<float>(w) * inverse[i];
    }
    weight[i * both + i] = static_cast<float>(-along) * inverse[i];
    radial[i] = static_cast<float>(along);
  }
  for (int64_t n = 0; n < count; ++n) {
    std::copy(of_penalty.begin(), of_penalty.end(), row.begin());
    for (int64_t j = 0; j < both; ++j)
      for (int64_t i = 0; i < both; ++i) row[i] += weight[j * both + i] * unit[n * both + j];
    for (int view = 0; view < 2; ++view)
      std::copy_n(&row[view * clusters], clusters, grad + (view * count + n) * clusters);
  }
}

}  // namespace relssl
