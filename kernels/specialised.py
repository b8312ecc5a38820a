"""Forward with specialised warps, for Hopper and Blackwell: a candidate that runs only where it is named.

It stores what forward.py stores, but Triton gives copies, matrix products and exponentials warps of their
own, which overlap. That takes one loop a kernel, and rows of x that TMA can load: so a block has rows
of one stack, nothing may be excluded from the queue, and rows for which the fixed shift is not exact are
marked by a sum that is NaN or out of range, for forward.py to recompute in a launch of its own (REDO there).

It takes 16-bit rows, D = 64 and 128. No GPU has run it.
"""

import inspect

import triton
import triton.language as tl
from relssl.kernels.common import HUGE, load_scale, mask, narrow

specialises = "warp_specialize" in inspect.signature(tl.range).parameters  # this version of Triton


@triton.jit(do_not_specialize=["num_first", "rows", "size", "step"])
def specialised(
    first, second, queue, ids, queue_ids, filled, scale_first, scale_second,
    stats, means,
    first_stride, second_stride, queue_stride,
    num_first, rows, size, step,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MEAN: tl.constexpr, EVEN: tl.constexpr, FIXED: tl.constexpr, DEVICE_SCALE: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """Arguments as forward.forward has them. The grid has first the blocks of the first stack."""
    own_split, num_splits = tl.program_id(1), tl.num_programs(1)
    blocks = tl.cdiv(num_first, BLOCK_M)
    is_first = tl.program_id(0) < blocks
    count = tl.where(is_first, num_first, rows - num_first)
    stride = tl.where(is_first, first_stride.to(tl.int64), second_stride.to(tl.int64))
    start_m = (tl.program_id(0) - tl.where(is_first, 0, blocks)) * BLOCK_M
    stack = tl.make_tensor_descriptor(
        tl.where(is_first, first, second), [count, DIM], [stride, 1], [BLOCK_M, BLOCK_D]
    )
    tiles = tl.make_tensor_descriptor(queue, [size, DIM], [queue_stride.to(tl.int64), 1], [BLOCK_N, BLOCK_D])
    x = stack.load([start_m, 0])
    c = tl.where(is_first, load_scale(scale_first, DEVICE_SCALE), load_scale(scale_second, DEVICE_SCALE))

    shift = tl.full([BLOCK_M], 0.0 if FIXED else -HUGE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    divisor = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = own_split * step
    for start in tl.range(begin, tl.minimum(begin + step, size), BLOCK_N, warp_specialize=True):
        tile = tiles.load([start, 0])
        s = tl.dot(x, tl.trans(tile), input_precision="ieee")
        s = mask(s, start + tl.arange(0, BLOCK_N), size, shift, shift, EVEN, 0)
        if FIXED:
            p = tl.exp2(s * c)
        else:
            grown = tl.maximum(shift, tl.max(s, 1))
            factor = tl.exp2((shift - grown) * c)
            shift = grown
            total *= factor
            p = tl.exp2((s - shift[:, None]) * c)
        total += tl.sum(p, 1)
        if MEAN:
            rounded = narrow(p, tile.dtype, PACK)
            if not FIXED:
                divisor *= factor
                mean *= factor[:, None]
            divisor += tl.sum(rounded.to(tl.float32), 1)
            mean = tl.dot(rounded, tile, mean, input_precision="ieee")
    if FIXED and MEAN:
        total += tl.sum(mean - mean, 1)  # 0 or NaN

    m = start_m + tl.arange(0, BLOCK_M)
    inside = m < count
    row = m + tl.where(is_first, 0, num_first)
    at = stats + own_split.to(tl.int64) * rows + row
    plane = num_splits.to(tl.int64) * rows
    tl.store(at, shift, mask=inside)
    tl.store(at + plane, total, mask=inside)
    tl.store(stats + 3 * plane, 0.0, mask=(tl.program_id(0) == 0) & (own_split == 0))  # see combine.py
    if MEAN:
        tl.store(at + 2 * plane, divisor, mask=inside)
        d = tl.arange(0, BLOCK_D)
        to = means + (own_split.to(tl.int64) * rows + row)[:, None] * DIM + d[None, :]
        tl.store(to, mean, mask=inside[:, None] & (d < DIM)[None, :])
