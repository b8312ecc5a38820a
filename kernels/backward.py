"""Backward: gradients of x and of the queue from x, queue and lse, recomputing the rest.

    u_rj = <m_j, g_mean_r>    p_rj = 2^(c <x_r, m_j> - lse_r)    w_rj = p_rj (base_r + u_rj)

    lse_to_log2     converts lse for the other two
    backward_x      total_r = sum_j w_rj and weighted_r = sum_j w_rj m_j, of a block of rows and a split
                    SYMMETRIC: the queue is x itself, and w_rj = p_rj base_r + p_jr base_j, but w_rr = 0
    backward_queue  grad_queue_j = sum_r w_rj x_r / tau + p_rj g_row_r: a program owns a tile of the queue
                    and passes over all rows, so nothing is added atomically

Products with a gradient in them need its range: beside bfloat16 they are of bfloat16, but beside float16 of
float32 (TF32 loses no digit of a float16), since p or g may lie below the smallest float16.
"""

import triton
import triton.language as tl
from relssl.kernels.common import (
    HUGE,
    LN2,
    LOG2E,
    addresses,
    load,
    load_queue_ids,
    load_row_ids,
    load_scale,
    mask,
    narrow,
    product,
    rows_in_use,
)


@triton.jit(do_not_specialize=["rows"])
def lse_to_log2(lse, scale, out, rows, BLOCK: tl.constexpr, DEVICE_SCALE: tl.constexpr):
    """Writes lse [2, rows], in units of log 2, as high * c + low: (s - high) c - low is exact where lse is
    large.

    It computes in float64, which the loops of the kernels below avoid.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    c = load_scale(scale, DEVICE_SCALE).to(tl.float64)
    exact = tl.load(lse + row, mask=inside, other=0.0).to(tl.float64)
    exact = (exact + tl.load(lse + rows + row, mask=inside, other=0.0).to(tl.float64)) * LOG2E
    # Within float32, however small c is. An empty row has no weights: its lse would make them NaN.
    empty = exact == float("-inf")
    most = HUGE / 2
    high = tl.minimum(tl.maximum(exact / c, -most), most).to(tl.float32)
    high = tl.where(exact == exact, high, float("nan"))
    low = (exact - high.to(tl.float64) * c).to(tl.float32)
    tl.store(out + row, tl.where(empty, HUGE, high), mask=inside)
    tl.store(out + rows + row, tl.where(empty, 0.0, low), mask=inside)


@triton.jit
def as_weight(x, like, PACK: tl.constexpr):
    """Returns x in the dtype that products with gradients have beside rows of dtype `like`."""
    return narrow(x, tl.bfloat16 if like == tl.bfloat16 else tl.float32, PACK)


@triton.jit(do_not_specialize=["rows", "size", "step"])
def backward_x(
    x, queue, ids, queue_ids, filled, scale, lse, base, g_mean,
    totals, weighted,  # [splits, rows], [splits, rows, DIM]
    x_stride, queue_stride,
    rows, size, step,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EXCLUDE: tl.constexpr, FILLED: tl.constexpr, EVEN: tl.constexpr, G_MEAN: tl.constexpr,
    WEIGHTED: tl.constexpr, SYMMETRIC: tl.constexpr,
    DEVICE_SCALE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own_split = tl.program_id(1).to(tl.int64)
    inside = row < rows
    d = tl.arange(0, BLOCK_D)
    x_at = addresses(x, x_stride, row)
    own = load(x_at, inside, d, DIM)
    c = load_scale(scale, DEVICE_SCALE)
    high = tl.load(lse + row, mask=inside, other=0.0)
    low = tl.load(lse + rows + row, mask=inside, other=0.0)
    own_base = tl.load(base + row, mask=inside, other=0.0)
    row_ids = load_row_ids(ids, row, rows, EXCLUDE)
    size = rows_in_use(size, filled, FILLED)
    if G_MEAN:
        g_at = addresses(g_mean, DIM, row)
        g = as_weight(load(g_at, inside, d, DIM), own.dtype, PACK)
    total = tl.zeros([BLOCK_M], tl.float32)
    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = tl.program_id(1) * step
    # As in forward.py.
    for start in tl.range(
        begin, tl.minimum(begin + step, size), BLOCK_N, disable_licm=PACK and BLOCK_D == 512
    ):
        n = start + tl.arange(0, BLOCK_N)
        tile_at = addresses(queue, queue_stride, n)
        tile = load(tile_at, n < size, d, DIM, EVEN)
        s = product(own, x_at, inside, tile, tile_at, n < size, DIM, PRECISION, CHUNK, PACK)
        # Without EXCLUDE, the ids are the rows' indices.
        s = mask(s, n, size, row_ids, load_queue_ids(queue_ids, n, size, EXCLUDE), EVEN, EXCLUDE or SYMMETRIC)
        w = tl.exp2((s - high[:, None]) * c - low[:, None])
        wide = as_weight(tile, tile.dtype, PACK)
        if G_MEAN:
            u = product(g, g_at, inside, wide, tile_at, n < size, DIM, PRECISION, CHUNK, PACK)
            w *= own_base[:, None] + u
        else:
            w *= own_base[:, None]
        if SYMMETRIC:
            column_high = tl.load(lse + n, mask=n < size, other=0.0)
            column_low = tl.load(lse + rows + n, mask=n < size, other=0.0)
            column_base = tl.load(base + n, mask=n < size, other=0.0)
            w += tl.exp2((s - column_high[None, :]) * c - column_low[None, :]) * column_base[None, :]
        total += tl.sum(w, 1)
        if WEIGHTED:
            grad = tl.dot(as_weight(w, tile.dtype, PACK), wide, grad, input_precision=PRECISION)
    index = own_split * rows + row
    tl.store(totals + index, total, mask=inside)
    if WEIGHTED:
        tl.store(
            weighted + index[:, None] * DIM + d[None, :], grad, mask=inside[:, None] & (d < DIM)[None, :]
        )


@triton.jit(do_not_specialize=["rows", "size"])
def backward_queue(
    x, queue, ids, queue_ids, filled, scale, lse, base, g_mean, g_row,
    grad_queue,  # [size, DIM]
    x_stride, queue_stride,
    rows, size,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EXCLUDE: tl.constexpr, FILLED: tl.constexpr, G_MEAN: tl.constexpr, G_ROW: tl.constexpr,
    DEVICE_SCALE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    used = rows_in_use(size, filled, FILLED)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    tile_at = addresses(queue, queue_stride, n)
    tile = load(tile_at, n < used, d, DIM)
    wide = as_weight(tile, tile.dtype, PACK)
    ids_of_tile = load_queue_ids(queue_ids, n, used, EXCLUDE)
    c = load_scale(scale, DEVICE_SCALE)
    grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(0, rows, BLOCK_M, disable_licm=PACK and BLOCK_D == 512):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < rows
        x_at = addresses(x, x_stride, row)
        own = load(x_at, inside, d, DIM)
        high = tl.load(lse + row, mask=inside, other=0.0)
        low = tl.load(lse + rows + row, mask=inside, other=0.0)
        # As the forward pass has them, row by row: lse belongs to these, to the last digit.
        s = product(own, x_at, inside, tile, tile_at, n < used, DIM, PRECISION, CHUNK, PACK)
        # Rows beyond the queue are not stored, but those that are not in use get zeros.
        s = mask(s, n, used, load_row_ids(ids, row, rows, EXCLUDE), ids_of_tile, not FILLED, EXCLUDE)
        # Rows beyond the last have zeros for x, base and g: they add nothing.
        p = tl.exp2((s - high[:, None]) * c - low[:, None])
        w = tl.load(base + row, mask=inside, other=0.0)[:, None]
        if G_MEAN:
            g_at = addresses(g_mean, DIM, row)
            g = as_weight(load(g_at, inside, d, DIM), tile.dtype, PACK)
            w = w + product(g, g_at, inside, wide, tile_at, n < used, DIM, PRECISION, CHUNK, PACK)
        w = as_weight(p * w * (c * LN2), tile.dtype, PACK)
        grad = tl.dot(tl.trans(w), as_weight(own, tile.dtype, PACK), grad, input_precision=PRECISION)
        if G_ROW:
            g = as_weight(load(addresses(g_row, DIM, row), inside, d, DIM), tile.dtype, PACK)
            grad = tl.dot(tl.trans(as_weight(p, tile.dtype, PACK)), g, grad, input_precision=PRECISION)
    to = grad_queue + n.to(tl.int64)[:, None] * DIM + d[None, :]
    tl.store(to, grad, mask=(n < size)[:, None] & (d < DIM)[None, :])
