// A scale as kernels multiply with it.

#pragma once

#include <cfloat>

#include "lookup.h"

namespace relssl {

// 1 / temperature in units of log 2, exp2 being what the hardware has.
__device__ inline float load_scale(const Scale& scale) {
  if (!scale.address) return scale.value;
  const float c = *scale.address * 1.4426950408889634f;
  return c < FLT_MIN ? FLT_MIN : c;  // A left-out entry has the similarity -inf, and 0 * inf is NaN.
}

}  // namespace relssl
