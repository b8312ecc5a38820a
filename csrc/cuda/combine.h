// The splits of the queue merged, and the losses: epilogues of a lookup.

#pragma once

#include <cstdint>

#include "lookup.h"

namespace relssl {

constexpr int MOST_SPLITS = 256, WIDEST = 512;

// What a lookup left for a range of its rows: see Lookup. `rows` are all of them, `offset` the first of the range.
struct Partials {
  const float *stats, *means;
  int rows, offset, splits;
};

// lse [2, rows] in two parts, whose sum it is, and mean [rows, dim] or null. The first `split` rows have the first
// scale.
struct CombineRows {
  Partials partials;
  Scale scale_first, scale_second;
  int split, dim;
  float *lse, *mean;
};

// A student row r of q [rows, dim], whose teacher is row r % batch of k. loss [rows], entropy [batch], grad_q [rows,
// dim] or null, of weight times the sum of the losses, lse [2, batch + rows], mean_t [batch, dim].
struct CombineRelation {
  Partials teacher, student;
  const uint16_t *q, *k;
  int64_t q_stride, k_stride;
  Scale scale_s, scale_t;
  int batch, rows, dim;
  bool bf16, kl;
  float weight;
  float *loss, *entropy, *grad_q, *lse, *mean_t;
};

// A row r of q, whose positive is row r % batch of k. loss and sigma [rows], grad_q [rows, dim] or null, of weight
// times the sum of the losses, lse [2, rows].
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

// Throws the reason why nothing of this runs on a device.
void probe(int device);

void combine(const CombineRows&, const Where&);
void combine(const CombineRelation&, const Where&);
void combine(const CombineInfoNCE&, const Where&);

}  // namespace relssl
