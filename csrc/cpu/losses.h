// The kernels over all rows and the whole queue, on several threads, and the relation loss over them.
//
// Nothing here depends on an instruction set. Arguments have been checked, and results are allocated by the caller.
// For a given number of threads the work is always cut and merged in the same way: results repeat bit for bit.

#pragma once

#include "kernels.h"

namespace relssl {

// lse [2, rows] and the mean of each stack, [count, dim] or null, as the contract of relssl/backends has them.
void rows(const Kernels&, const Inputs&, float* lse, float* const mean[2], int threads);

// The relation loss: stack 0 is the teacher's batch, stack 1 the students', view after view. loss is weight times the
// sum of the rows' losses where `total`, else has a row for each of stack 1; entropy [stack 0], lse [2, rows],
// mean_t [stack 0, dim], and grad_q [stack 1, dim], of weight times that sum, or null.
void relation(const Kernels&, const Inputs&, bool kl, double weight, bool total, float* loss, float* entropy,
              float* grad_q, float* lse, float* mean_t, int threads);

// One scale for all rows (stack 0). mean [rows, dim] is needed with g_mean. grad_x [rows, dim] and grad_queue
// [size, dim] may be null.
void vjp(const Kernels&, const Inputs&, const float* lse, const float* mean, const float* g_lse, const float* g_mean,
         const float* g_row, float* grad_x, float* grad_queue, int threads);

}  // namespace relssl
