"""Helpers of the kernels: loading rows, scales and similarities.

Throughout, c = log2(e) / temperature: exponents are in units of log 2, exp2 being what the hardware has. c
multiplies in float32 after a matrix product; rows are never rounded a second time.

PRECISION is that of float32 products, "ieee", "tf32x3" or "tf32"; those of 16-bit numbers are exact.
"""

import triton
import triton.language as tl
from relssl.kernels import heuristics

LOG2E = tl.constexpr(heuristics.LOG2E)
LN2 = tl.constexpr(0.6931471805599453)
HUGE = tl.constexpr(3.4028234663852886e38)  # the largest float32
TINY = tl.constexpr(heuristics.TINY)


@triton.jit
def load_scale(scale, ON_DEVICE: tl.constexpr):
    """Returns c: the number itself, or from 1 / temperature where that lies on the device."""
    if ON_DEVICE:
        c = tl.load(scale) * LOG2E
        c = tl.where(c < TINY, TINY, c)  # A left-out entry has the similarity -inf, and 0 * inf is NaN.
    else:
        c = scale
    return c


@triton.jit
def addresses(start, stride, row):
    """Returns those of rows [M]."""
    return start + row.to(tl.int64) * stride


@triton.jit
def load(at, valid, d, DIM: tl.constexpr, EVEN: tl.constexpr = False):
    """Loads rows [M, D] at addresses [M]; zeros beyond DIM and where not `valid`. EVEN: all are."""
    at = at[:, None] + d[None, :]
    if EVEN and d.shape[0] == DIM:
        rows = tl.load(at)
    elif EVEN:
        rows = tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    else:
        rows = tl.load(at, mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
    return rows


@triton.jit
def narrow(x, dtype: tl.constexpr, PACK: tl.constexpr):
    """Returns x in a matrix product's dtype. PACK: NVIDIA's instruction rounds two numbers to bfloat16 at a
    time.

    Where the rounded value is also summed, ptxas converts one by one, in the unit that the exponentials need.
    """
    if PACK and x.dtype == tl.float32 and dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return x.to(dtype)


@triton.jit
def product(
    x, x_at, x_valid, tile, tile_at, tile_valid,
    DIM: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Computes x tile^T, [M, N], for x [M, D] and a tile [N, D], which lie at the addresses.

    Products of float32 take both sides apart in registers. Wide rows would overflow these, and are read
    again, CHUNK columns at a time.
    """
    if CHUNK >= DIM:
        s = tl.dot(x, tl.trans(tile), input_precision=PRECISION)
    else:
        s = tl.zeros([x.shape[0], tile.shape[0]], tl.float32)
        for start in range(0, DIM, CHUNK):
            d = start + tl.arange(0, CHUNK)
            left = narrow(load(x_at, x_valid, d, DIM), x.dtype, PACK)
            right = load(tile_at, tile_valid, d, DIM).to(tile.dtype)
            s = tl.dot(left, tl.trans(right), s, input_precision=PRECISION)
    return s


@triton.jit
def mask(s, n, size, row_ids, ids, EVEN: tl.constexpr, EXCLUDE: tl.constexpr):
    """Returns similarities s [M, N] with -inf beyond the queue and where a row excludes an entry."""
    if not EVEN:
        s = tl.where((n < size)[None, :], s, float("-inf"))
    if EXCLUDE:
        s = tl.where(ids[None, :] == row_ids[:, None], float("-inf"), s)
    return s


# EXCLUDE, in the kernels: 0 excludes nothing, 1 the queue row whose index a row of x has as its id, and 2
# those of its id. A negative id matches nothing.


@triton.jit
def load_row_ids(ids, row, rows, EXCLUDE: tl.constexpr):
    """Loads the ids [M] of rows of x; indices as int32, since a queue has fewer rows than 2^31."""
    if EXCLUDE == 1:
        row = tl.load(ids + row, mask=row < rows, other=-1).to(tl.int32)
    elif EXCLUDE == 2:
        row = tl.maximum(tl.load(ids + row, mask=row < rows, other=-1), -1)
    return row


@triton.jit
def load_queue_ids(queue_ids, n, size, EXCLUDE: tl.constexpr):
    """Loads the ids [N] of a tile of the queue, or returns its indices."""
    if EXCLUDE == 2:
        n = tl.load(queue_ids + n, mask=n < size, other=-2)
        n = tl.where(n < 0, -2, n)
    return n


@triton.jit
def rows_in_use(size, filled, FILLED: tl.constexpr):
    """Returns how many rows of the queue are in use, the first ones: `filled` is a number on the device."""
    if FILLED:
        size = tl.minimum(tl.load(filled).to(tl.int32), size)
    return size
