"""Forward: sums and mean of a block of rows over one split of the queue, writing nothing of size R x K.

Flash attention with a scale per row and the queue for both keys and values: a tile is loaded once for
both products. A program owns BLOCK_M rows of the stacked [first; second] and the queue rows of one split; it
leaves, for each of its rows and that split,

    shift r, sum l = sum_j 2^(c (s_j - r)), divisor l', mean O = sum_j p_j m_j

where s_j = <x, m_j>, p_j is 2^(c (s_j - r)) rounded to the tile's dtype and l' is the sum of those: with
16-bit p the exact sum makes the better log-sum-exp (up to 70 times), the rounded one the better divisor of O
(up to 3 times). combine.py merges the splits in a fixed order, so results do not change from run to run.

The shift r is a similarity, subtracted before scaling: the difference of two large ones is exact. FIXED
tries r = 0 first, which needs no maximum and no rescaling of O, and checks afterwards whether any row left
the range in which that is exact; only then does the program start again with a running maximum (Milakov &
Gimelshein 2018). 2^(c s) may overflow float16, which starts there.

specialised.py makes the first try in a launch of its own; REDO is the second to that: it ends at once where
the sums that it finds are exact.

TMA loads whole tiles on Hopper and later, which frees the registers that addresses take.
"""

import triton
import triton.language as tl
from relssl.kernels.common import (
    HUGE,
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


@triton.jit
def sweep(
    x, x_at, inside, c, row_ids, queue_ids, queue, queue_stride, begin, end, size, d,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MEAN: tl.constexpr,
    EXCLUDE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    PACK: tl.constexpr, TMA: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    shift = tl.full([BLOCK_M], -HUGE if ONLINE else 0.0, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    divisor = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, d.shape[0]], tl.float32)
    if TMA:
        tiles = tl.make_tensor_descriptor(
            queue, [size, DIM], [queue_stride.to(tl.int64), 1], [BLOCK_N, d.shape[0]]
        )
    # At this width NVIDIA's chips lack the registers for what a loop can work out again.
    for start in tl.range(begin, end, BLOCK_N, disable_licm=PACK and d.shape[0] == 512):
        n = start + tl.arange(0, BLOCK_N)
        tile_at = addresses(queue, queue_stride, n)
        tile = tiles.load([start, 0]) if TMA else load(tile_at, n < size, d, DIM, EVEN)
        s = product(x, x_at, inside, tile, tile_at, n < size, DIM, PRECISION, CHUNK, PACK)
        s = mask(s, n, size, row_ids, load_queue_ids(queue_ids, n, size, EXCLUDE), EVEN, EXCLUDE)
        if ONLINE:
            grown = tl.maximum(shift, tl.max(s, 1))
            factor = tl.exp2((shift - grown) * c)
            shift = grown
            total *= factor
            p = tl.exp2((s - shift[:, None]) * c[:, None])
        else:
            p = tl.exp2(s * c[:, None])
        total += tl.sum(p, 1)
        if MEAN:
            rounded = narrow(p, tile.dtype, PACK)
            if ONLINE:
                divisor *= factor
                mean *= factor[:, None]
            if tile.dtype != tl.float32:
                divisor += tl.sum(rounded.to(tl.float32), 1)
            mean = tl.dot(rounded, tile, mean, input_precision=PRECISION)
    if MEAN and x.dtype == tl.float32:
        divisor = total
    return shift, total, divisor, mean


@triton.jit
def is_exact(total, size):
    """Whether all sums [M] with the shift 0 are exact. NaN is not.

    What sank below 2^-126 is less than an ulp of such a sum, and nothing came near infinity.
    """
    exact = (total >= size * 2.0**-102) & (total <= 2.0**100)
    return tl.min(exact.to(tl.int32), 0) == 1


@triton.jit(do_not_specialize=["num_first", "rows", "size", "step"])
def forward(
    first, second, queue, ids, queue_ids, filled, scale_first, scale_second,
    stats,  # [3, num_splits, rows]: shift, sum and divisor; behind them a zero, see combine.py
    means,  # [num_splits, rows, DIM]; unused without MEAN
    first_stride, second_stride, queue_stride,
    num_first, rows, size,
    step,  # queue rows in a split: whole tiles
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MEAN: tl.constexpr, EXCLUDE: tl.constexpr, FILLED: tl.constexpr, EVEN: tl.constexpr, FIXED: tl.constexpr,
    DEVICE_SCALE: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, PACK: tl.constexpr,
    TMA: tl.constexpr, REDO: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own_split, num_splits = tl.program_id(1), tl.num_programs(1)
    d = tl.arange(0, BLOCK_D)
    if REDO:
        totals = stats + (num_splits + own_split).to(tl.int64) * rows
        done = is_exact(tl.load(totals + row, mask=row < rows, other=1.0), size)
        if done:
            return

    # A block may hold rows of both stacks.
    inside = row < rows
    x_at = tl.where(
        row < num_first,
        addresses(first, first_stride, row),
        addresses(second, second_stride, row - num_first),
    )
    x = load(x_at, inside, d, DIM)
    c = tl.where(
        row < num_first, load_scale(scale_first, DEVICE_SCALE), load_scale(scale_second, DEVICE_SCALE)
    )
    row_ids = load_row_ids(ids, row, rows, EXCLUDE)
    used = rows_in_use(size, filled, FILLED)
    begin = own_split * step
    end = tl.minimum(begin + step, used)

    shift, total, divisor, mean = sweep(
        x, x_at, inside, c, row_ids, queue_ids, queue, queue_stride, begin, end, used, d,
        DIM, BLOCK_M, BLOCK_N, MEAN, EXCLUDE, EVEN, PRECISION, CHUNK, PACK, TMA, not FIXED,
    )  # fmt: skip
    if FIXED:
        seen = total
        if MEAN:
            seen += tl.sum(mean - mean)  # 0 or NaN. (Over one axis alone, sm_100 does not compile.)
        if not is_exact(seen, size):  # A split without rows in use is not.
            shift, total, divisor, mean = sweep(
                x, x_at, inside, c, row_ids, queue_ids, queue, queue_stride, begin, end, used, d,
                DIM, BLOCK_M, BLOCK_N, MEAN, EXCLUDE, EVEN, PRECISION, CHUNK, PACK, TMA, True,
            )  # fmt: skip

    at = stats + own_split.to(tl.int64) * rows + row
    plane = num_splits.to(tl.int64) * rows
    tl.store(at, shift, mask=inside)
    tl.store(at + plane, total, mask=inside)
    tl.store(stats + 3 * plane, 0.0, mask=(tl.program_id(0) == 0) & (own_split == 0))
    if MEAN:
        tl.store(at + 2 * plane, divisor, mask=inside)
        to = means + (own_split.to(tl.int64) * rows + row)[:, None] * DIM + d[None, :]
        tl.store(to, mean, mask=inside[:, None] & (d < DIM)[None, :])
