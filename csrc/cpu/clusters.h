// The cluster loss of few clusters, on one thread: it is shorter than the call that would wake another.

#pragma once

#include <cstdint>

namespace relssl {

// Computes the loss of relssl/backends/clusters.py for the assignments p[0] and p[1], [count, clusters] each. With grad
// [2, count, clusters], which may be null, also radial [2 clusters] as defined there.
void cluster_loss(const float* const p[2], int64_t count, int64_t clusters, double scale, bool penalize, float* loss,
                  float* grad, float* radial);

}  // namespace relssl
