// Loads a scale in the unit in which the kernels multiply by it.

#pragma once

#include <cfloat>

#include "forward.h"

namespace relssl {

// Returns 1 / temperature in units of log 2, because the hardware computes exp2.
__device__ inline float load_scale(const Scale& scale) {
  if (!scale.address) return scale.value;
  const float c = *scale.address * 1.4426950408889634f;
  return c < FLT_MIN ? FLT_MIN : c;  // An excluded entry has the similarity -inf, and 0 * inf is NaN.
}

}  // namespace relssl
