"""Combines the splits of the queue, and computes the losses: one program for each row.

The order of summation is fixed. What depends on a row alone is computed in float64: it is a few numbers, a
loss is the small difference of large ones, and a log-sum-exp rounded to one float32 would carry its rounding
into every p = exp(logit - lse) of a backward pass. Hence lse is stored in two parts, whose sum it is.

The last program to arrive adds up the rows' losses, which takes no launch of its own. They arrive at an int32
behind the stats, which the forward pass has set to zero: nothing is kept from call to call.
"""

import triton
import triton.language as tl
from relssl.kernels.common import HUGE, LN2, load_scale


@triton.jit
def merge(stats, row, rows, num_splits, c, S: tl.constexpr, MEAN: tl.constexpr):
    """Returns a row's log-sum-exp in units of log 2, float64, and the weights [S] of its partial means."""
    s = tl.arange(0, S)
    inside = s < num_splits
    at = stats + s.to(tl.int64) * rows + row
    plane = num_splits.to(tl.int64) * rows
    shift = tl.load(at, mask=inside, other=-HUGE)
    top = tl.max(shift, 0)
    weight = tl.exp2((shift - top) * c)
    total = tl.sum(weight * tl.load(at + plane, mask=inside, other=0.0), 0)
    lse = top.to(tl.float64) * c.to(tl.float64) + tl.log2(total.to(tl.float64))
    if MEAN:
        divisor = tl.sum(weight * tl.load(at + 2 * plane, mask=inside, other=0.0), 0)
        weight = weight / tl.where(divisor == 0.0, 1.0, divisor)  # An empty row has the mean 0.
    return lse, weight


@triton.jit
def load_mean(means, row, rows, num_splits, weight, d, S: tl.constexpr, DIM: tl.constexpr):
    s = tl.arange(0, S)
    at = means + (s.to(tl.int64) * rows + row)[:, None] * DIM + d[None, :]
    part = tl.load(at, mask=(s < num_splits)[:, None] & (d < DIM)[None, :], other=0.0)
    return tl.sum(part * weight[:, None], 0)


@triton.jit
def store_lse(lse, to, row, rows):
    """Stores lse as high + low, [2, rows]."""
    natural = lse * LN2
    high = natural.to(tl.float32)
    low = (natural - high.to(tl.float64)).to(tl.float32)
    tl.store(to + row, high)
    tl.store(to + rows + row, tl.where(high == float("-inf"), 0.0, low))


@triton.jit
def arrivals(stats, num_splits, rows):
    return (stats + 3 * num_splits.to(tl.int64) * rows).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def store_total(losses, loss, weight, arrived, BLOCK: tl.constexpr = 1024):
    """weight times the sum of the losses, one of each program, which have stored them: by the last to arrive.

    Their order does not depend on which one that is. With so many partial sums float32 loses no more than in
    pairwise summation; float64 is 64 times slower on consumer GPUs.
    """
    rows = tl.num_programs(0)
    tl.debug_barrier()  # One thread arrives for all.
    if tl.atomic_add(arrived, 1, sem="acq_rel") == rows - 1:
        part = tl.zeros([BLOCK], tl.float32)
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            # Other processors stored them: from the L2 cache.
            part += tl.load(losses + row, mask=row < rows, other=0.0, cache_modifier=".cg")
        tl.store(loss, weight * tl.sum(part, 0))


@triton.jit
def inner(x, mean):
    return tl.sum(x.to(tl.float64) * mean.to(tl.float64), 0)


@triton.jit
def cross_entropy(lse, c, along, EXCLUDE: tl.constexpr):
    """Returns that of a row with the teacher's softmax, in units of log 2; 0 for an empty row.

    Without EXCLUDE no row is empty: logits below all floats have the lse -inf, too, and make the loss NaN.
    """
    cross = lse - c.to(tl.float64) * along
    if EXCLUDE:
        cross = tl.where(lse == float("-inf"), 0.0, cross)
    return cross


@triton.jit(do_not_specialize=["num_first", "rows", "num_splits"])
def combine_lse_and_mean(
    stats, means, scale_first, scale_second,
    lse_out, mean_out,  # [2, rows], [rows, DIM]
    num_first, rows, num_splits,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, S: tl.constexpr, MEAN: tl.constexpr, DEVICE_SCALE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.where(
        row < num_first, load_scale(scale_first, DEVICE_SCALE), load_scale(scale_second, DEVICE_SCALE)
    )
    lse, weight = merge(stats, row, rows, num_splits, c, S, MEAN)
    store_lse(lse, lse_out, row, rows)
    if MEAN:
        for start in range(0, DIM, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mean = load_mean(means, row, rows, num_splits, weight, d, S, DIM)
            tl.store(mean_out + row.to(tl.int64) * DIM + d, mean, mask=d < DIM)


@triton.jit(do_not_specialize=["batch", "rows_t", "splits_t", "rows_s", "splits_s", "offset"])
def combine_relation(
    q, k, scale_s, scale_t, weight,
    stats_t, means_t, stats_s, means_s,  # may be one and the same: the teacher's rows come first
    losses, loss, entropy, grad_q, lse_out, mean_out,  # loss only with TOTAL
    q_stride, k_stride,
    batch, rows_t, splits_t, rows_s, splits_s,
    offset,  # of the students' rows in their stats and means
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, S: tl.constexpr,
    KL: tl.constexpr, TOTAL: tl.constexpr, GRAD: tl.constexpr, EXCLUDE: tl.constexpr,
    DEVICE_SCALE: tl.constexpr,
):  # fmt: skip
    """A program for each student row r, whose teacher is row r % batch; the first view's writes that, too.

    loss = A(theta_s) - <theta_s, mean_t> (- H(p_t) if KL),  H(p_t) = A(theta_t) - <theta_t, mean_t>
    grad_q = weight / temperature (mean_s - mean_t)
    """
    r = tl.program_id(0)
    students = tl.num_programs(0)
    b = r % batch
    c_s, c_t = load_scale(scale_s, DEVICE_SCALE), load_scale(scale_t, DEVICE_SCALE)
    lse_t, weight_t = merge(stats_t, b, rows_t, splits_t, c_t, S, True)
    lse_s, weight_s = merge(stats_s, offset + r, rows_s, splits_s, c_s, S, GRAD)
    store_lse(lse_s, lse_out, batch + r, batch + students)
    if r < batch:
        store_lse(lse_t, lse_out, b, batch + students)
    factor = weight * c_s * LN2
    along_s = tl.zeros([], tl.float64)
    along_t = tl.zeros([], tl.float64)
    for start in range(0, DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < DIM
        mean_t = load_mean(means_t, b, rows_t, splits_t, weight_t, d, S, DIM)
        along_s += inner(tl.load(q + r.to(tl.int64) * q_stride + d, mask=inside, other=0.0), mean_t)
        along_t += inner(tl.load(k + b.to(tl.int64) * k_stride + d, mask=inside, other=0.0), mean_t)
        if GRAD:
            mean_s = load_mean(means_s, offset + r, rows_s, splits_s, weight_s, d, S, DIM)
            tl.store(grad_q + r.to(tl.int64) * DIM + d, factor * (mean_s - mean_t), mask=inside)
        if r < batch:
            tl.store(mean_out + b.to(tl.int64) * DIM + d, mean_t, mask=inside)
    own = cross_entropy(lse_t, c_t, along_t, EXCLUDE)
    cross = cross_entropy(lse_s, c_s, along_s, EXCLUDE)
    if KL:
        cross -= own
    tl.store(losses + r, (cross * LN2).to(tl.float32))
    if r < batch:
        tl.store(entropy + b, (own * LN2).to(tl.float32))
    if TOTAL:
        store_total(losses, loss, weight, arrivals(stats_s, splits_s, rows_s))


@triton.jit(do_not_specialize=["batch", "rows", "num_splits"])
def combine_info_nce(
    q, k, scale, weight,
    stats, means,
    losses, loss, sigma, grad_q, lse_out,  # [rows], 0-d with TOTAL, [rows], [rows, DIM], [2, rows]
    q_stride, k_stride,
    batch, rows, num_splits,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, S: tl.constexpr,
    TOTAL: tl.constexpr, GRAD: tl.constexpr, DEVICE_SCALE: tl.constexpr,
):  # fmt: skip
    """A program for each row r of q, whose positive is row r % batch of k.

    loss = log(1 + e^z),  z = A(theta) - <theta, k>,  sigma = 1 / (1 + e^-z)
    grad_q = weight / temperature sigma (mean - k)
    """
    r = tl.program_id(0)
    b = r % batch
    c = load_scale(scale, DEVICE_SCALE)
    lse, share = merge(stats, r, rows, num_splits, c, S, GRAD)
    along = tl.zeros([], tl.float64)
    for start in range(0, DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        own = tl.load(q + r.to(tl.int64) * q_stride + d, mask=d < DIM, other=0.0)
        positive = tl.load(k + b.to(tl.int64) * k_stride + d, mask=d < DIM, other=0.0)
        along += inner(own, positive.to(tl.float32))
    along += 0.0 * along  # An infinite one becomes NaN, as in a softmax with it.
    z = LN2 * (lse - c.to(tl.float64) * along)
    small = tl.exp(-tl.abs(z))
    chance = tl.where(z > 0.0, 1.0, small) / (1.0 + small)
    tl.store(losses + r, (tl.maximum(z, 0.0) + tl.log(1.0 + small)).to(tl.float32))
    tl.store(sigma + r, chance.to(tl.float32))
    store_lse(lse, lse_out, r, rows)
    if GRAD:
        factor = weight * c * LN2 * chance.to(tl.float32)
        for start in range(0, DIM, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mean = load_mean(means, r, rows, num_splits, share, d, S, DIM)
            positive = tl.load(k + b.to(tl.int64) * k_stride + d, mask=d < DIM, other=0.0)
            grad = factor * (mean - positive.to(tl.float32))
            tl.store(grad_q + r.to(tl.int64) * DIM + d, grad, mask=d < DIM)
    if TOTAL:
        store_total(losses, loss, weight, arrivals(stats, num_splits, rows))
