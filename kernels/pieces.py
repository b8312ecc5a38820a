"""What the kernels share: loading rows, scales and similarities.

Throughout, c = log2(e) / temperature: exponents are in units of log 2, exp2 being what the hardware has. c
multiplies in float32 after a matrix product; rows are never rounded a second time.

PRECISION is that of float32 products, "ieee", "tf32x3" or "tf32"; those of 16-bit numbers are exact.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HUGE = tl.constexpr(3.4028234663852886e38)  # the largest float32
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal one


@triton.jit
def load_scale(scale, ON_DEVICE: tl.constexpr):
    """c of a number, which the host has made one, or of 1 / temperature where that lies on the device."""
    if ON_DEVICE:
        c = tl.load(scale) * LOG2E
        c = tl.where(c < TINY, TINY, c)  # A left-out entry has the similarity -inf, and 0 * inf is NaN.
    else:
        c = scale
    return c


@triton.jit
def load_rows(start, stride, row, rows, d, DIM: tl.constexpr):
    """Rows [M, D] at start + row * stride; zeros outside."""
    at = start + row.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=(row < rows)[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def load_tile(queue, stride, n, size, d, DIM: tl.constexpr, EVEN: tl.constexpr):
    """Queue rows n [N] as a tile [N, D]; zeros outside. EVEN: there are no rows outside."""
    at = queue + n.to(tl.int64)[:, None] * stride + d[None, :]
    if EVEN:
        if d.shape[0] == DIM:
            return tl.load(at)
        return tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    return tl.load(at, mask=(n < size)[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def mask(s, n, size, excluded, EVEN: tl.constexpr, EXCLUDE: tl.constexpr):
    """Similarities s [M, N]: -inf beyond the queue and where a row leaves an entry out."""
    if not EVEN:
        s = tl.where((n < size)[None, :], s, float("-inf"))
    if EXCLUDE:
        s = tl.where(n[None, :] == excluded[:, None], float("-inf"), s)
    return s


@triton.jit
def load_excluded(exclude, row, rows, EXCLUDE: tl.constexpr):
    """exclude [M] as int32: a queue has fewer rows than 2^31. Unread where nothing is left out."""
    if EXCLUDE:
        return tl.load(exclude + row, mask=row < rows, other=-1).to(tl.int32)
    return row
