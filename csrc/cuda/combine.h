// Merges the splits of the queue and computes the losses, after the forward kernels.

#pragma once

#include <cstdint>

#include "forward.h"

namespace relssl {

constexpr int MAX_SPLITS = 256, MAX_DIM = 512;

// The results of a forward kernel (see Forward) for a range of its rows: `rows` counts all rows, and the range begins
// at `offset`.
struct Partials {
  const float *stats, *means;
  int rows, offset, num_splits;
};

// lse [2, rows] is the sum of two parts; mean [rows, dim] may be null. The first `num_first` rows have the first scale.
struct CombineLseAndMean {
  Partials partials;
  Scale scale_first, scale_second;
  int num_first, dim;
  float *lse, *mean;
};

// The teacher of the student row r of q [rows, dim] is row r % batch of k. Results: loss [rows], entropy [batch], lse
// [2, batch + rows], mean_t [batch, dim], and grad_q [rows, dim] or null, the gradient of weight times the losses'
// sum.
struct CombineRelation {
  Partials teacher, student;
  const uint16_t *q, *k;
  int64_t q_stride, k_stride;
  Scale scale_s, scale_t;
  int batch, rows, dim;
  bool bf16, kl;
  bool may_be_empty;  // Rows may have excluded all of the queue.
  float weight;
  float *loss, *entropy, *grad_q, *lse, *mean_t;
};

// The positive of row r of q is row r % batch of k. Results: loss and sigma [rows], lse [2, rows], and grad_q [rows,
// dim] or null, the gradient of weight times the losses' sum.
struct CombineInfoNCE {
  Partials partials;
  const uint16_t *q, *k;
  int64_t q_stride, k_stride;
  Scale scale;
  int batch, rows, dim;
  bool bf16;
  float weight;
  float *loss, *sigma, *grad_q, *lse;
};

// Throws an error with the reason if these kernels cannot run on a device.
void probe(int device);

void combine(const CombineLseAndMean&, const DeviceStream&);
void combine(const CombineRelation&, const DeviceStream&);
void combine(const CombineInfoNCE&, const DeviceStream&);

}  // namespace relssl
