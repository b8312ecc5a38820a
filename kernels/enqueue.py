"""Writes a batch into a queue's ring: a program for each block of its rows, which casts them.

Every program reads the pointer, so only the last one to arrive may move it. They arrive in the upper half of
count, which is 0 between two launches, since a queue has fewer rows than 2^32: this takes no memory and no
launch of its own.
"""

import triton
import triton.language as tl
from relssl.kernels import heuristics

ONE = tl.constexpr(1 << 32)  # arrival
ELEMENTS = 1024  # in a block: eight in each thread of four warps


def blocks(dim: int) -> dict[str, int]:
    """Returns the constants of the kernel that depend on the width of a row."""
    width = heuristics.width(dim)
    return {"DIM": dim, "BLOCK_D": width, "BLOCK": max(1, ELEMENTS // width)}


@triton.jit
def wrap(index, size):
    """Returns the index in [0, size), for a negative one, too: a pointer may be loaded from anywhere."""
    index = index % size
    return tl.where(index < 0, index + size, index)


@triton.jit(do_not_specialize=["batch", "size"])
def enqueue(
    rows, ids, pointer, count,  # [size, DIM], [size] or None, 0-d, 0-d
    keys, key_ids,  # [batch, DIM], [batch] or None
    row_stride, column_stride,  # of keys
    batch, size,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Overwrites the oldest rows. Of more keys than rows the last stay; pointer and count advance by all."""
    start = tl.load(pointer)
    kept = tl.minimum(batch, size)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < kept
    key = (r + (batch - kept)).to(tl.int64)
    row = wrap(start + (batch - kept), size) + r
    row = tl.where(row < size, row, row - size)
    d = tl.arange(0, BLOCK_D)
    tile = inside[:, None] & (d < DIM)[None, :]
    at = keys + key[:, None] * row_stride + d.to(tl.int64)[None, :] * column_stride
    new = tl.load(at, mask=tile, other=0.0)
    tl.store(rows + row[:, None] * DIM + d[None, :], new.to(rows.dtype.element_ty), mask=tile)
    if IDS:
        tl.store(ids + row, tl.load(key_ids + key, mask=inside, other=0), mask=inside)
    tl.debug_barrier()  # One thread arrives for all, which have read the pointer then.
    before = tl.atomic_add(count, ONE, sem="acq_rel")
    if before // ONE == tl.num_programs(0) - 1:
        tl.store(pointer, wrap(start + batch, size))
        tl.store(count, tl.minimum(before % ONE + batch, size))
