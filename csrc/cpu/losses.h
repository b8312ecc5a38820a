// Runs the kernels over all rows and the whole queue, on several threads, and computes the relation loss.
//
// This code is independent of the instruction set. The caller has checked the arguments and allocates the results.
// For a given number of threads the work is always divided and merged in the same way, so results are reproducible
// bit for bit.

#pragma once

#include "kernels.h"

namespace relssl {

// Computes lse [2, rows] and the mean of each stack, [count, dim] or null, as the contract of relssl/backends defines
// them.
void lse_and_mean(const Kernels&, const Inputs&, float* lse, float* const mean[2], int threads);

// Computes the relation loss. Stack 0 is the teacher's batch, and stack 1 the students', view after view. loss is
// weight times the sum of the rows' losses if `total`, else one loss for each row of stack 1. The other results are
// entropy [stack 0], lse [2, rows], mean_t [stack 0, dim], and grad_q [stack 1, dim] or null, the gradient of weight
// times that sum.
void relation(const Kernels&, const Inputs&, bool kl, double weight, bool total, float* loss, float* entropy,
              float* grad_q, float* lse, float* mean_t, int threads);

// Computes the vector-Jacobian product of `lse_and_mean`, with one scale for all rows (stack 0). g_mean requires mean
// [rows, dim]. grad_x [rows, dim] and grad_queue [size, dim] may be null.
void vjp(const Kernels&, const Inputs&, const float* lse, const float* mean, const float* g_lse, const float* g_mean,
         const float* g_row, float* grad_x, float* grad_queue, int threads);

// Computes NT-Xent of the two views in stacks 0 and 1, which have one count and scale, and are the queue, too, as
// contiguous rows [2N, dim]. queue_lse [2, 2N] is that of further negatives, or null. The results are lse [2, 2N] of
// all negatives, loss as in `relation`, and grad [2N, dim] or null, the gradient of weight times the sum of the rows'
// losses, but for the further negatives.
void nt_xent(const Kernels&, const Inputs&, const float* queue_lse, double weight, bool total, float* loss, float* lse,
             float* grad, int threads);

// Computes the same gradient from lse, of the sum of g_r [2N] times the losses.
void nt_xent_vjp(const Kernels&, const Inputs&, const float* lse, const float* g, float* grad, int threads);

}  // namespace relssl
