"""BatchNorm of an image batch in parts: two launches forward, two backward, in channels_last.

x [S, N, C] has S parts of N = images * height * width rows. A program has BLOCK_C channels of a chunk of
`rows` rows of a part. The first launch writes each chunk's moments or sums; every program of the second one
merges those of its part again, which takes less time than a launch, and applies the result to its chunk.
"""

import triton
import triton.language as tl

BLOCK_N, MOST_CHUNKS = 32, 64  # rows of a tile; chunks of a part, which a program merges in one tile


def chunks(parts: int, size: int, channels: int, processors: int) -> tuple[int, dict[str, int]]:
    """Returns the rows of a chunk, and the constants of kernels with some programs on each processor."""
    block = min(64, triton.next_power_of_2(channels))
    wanted = max(1, 4 * processors // (parts * triton.cdiv(channels, block)))
    rows = max(triton.cdiv(size, min(wanted, MOST_CHUNKS)), BLOCK_N)
    count = triton.next_power_of_2(triton.cdiv(size, rows))
    return rows, {"CHUNKS": count, "BLOCK_C": block, "BLOCK_N": BLOCK_N}


@triton.jit
def place(size, channels, rows, BLOCK_C: tl.constexpr):
    """Returns this program's part, chunk, channels, which of them exist, and its first and last row."""
    part, chunk = tl.program_id(2), tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = chunk * rows
    return part, chunk, c, c < channels, first, tl.minimum(first + rows, size)


@triton.jit
def tile(part, size, channels, row, end, c, valid):
    """Returns offsets [BLOCK_N, BLOCK_C] into x, and which elements are of the chunk."""
    at = (part.to(tl.int64) * size + row).to(tl.int64)[:, None] * channels + c[None, :]
    return at, (row < end)[:, None] & valid[None, :]


@triton.jit
def partials_at(partials, which, part, channels, c, CHUNKS: tl.constexpr):
    """Returns addresses [CHUNKS, BLOCK_C] of partials [2, S, CHUNKS, C]."""
    row = (which * tl.num_programs(2) + part) * CHUNKS + tl.arange(0, CHUNKS)
    return partials + row[:, None] * channels + c[None, :]


@triton.jit
def store_partial(partials, which, part, chunk, channels, c, valid, value, CHUNKS: tl.constexpr):
    row = (which * tl.num_programs(2) + part) * CHUNKS + chunk
    tl.store(partials + row * channels + c, value, mask=valid)


@triton.jit
def moments(
    x, partials, size, channels, rows,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes each chunk's mean, and its sum of squared deviations from that."""
    part, chunk, c, valid, first, end = place(size, channels, rows, BLOCK_C)
    mean, squares = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_N):
        at, mask = tile(part, size, channels, start + tl.arange(0, BLOCK_N), end, c, valid)
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        before = (start - first).to(tl.float32)
        own = tl.minimum(end - start, BLOCK_N).to(tl.float32)
        own_mean = tl.sum(values, 0) / own
        deviation = tl.where(mask, values - own_mean[None, :], 0.0)
        delta, share = own_mean - mean, own / (before + own)
        mean += delta * share
        squares += tl.sum(deviation * deviation, 0) + delta * delta * before * share
    store_partial(partials, 0, part, chunk, channels, c, valid, mean, CHUNKS)
    store_partial(partials, 1, part, chunk, channels, c, valid, squares, CHUNKS)


@triton.jit
def normalize(
    x, weight, bias, partials,  # [S, N, C], [C], [C], [2, S, CHUNKS, C]
    y, stats, rstd_out,  # [S, N, C], [2, S, C], [S, C]
    size, channels, rows, eps,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes y, and each part's mean, unbiased variance and 1 / sqrt(variance + eps)."""
    part, chunk, c, valid, first, end = place(size, channels, rows, BLOCK_C)
    j = tl.arange(0, CHUNKS)
    count = tl.maximum(tl.minimum(size - j * rows, rows), 0)
    filled = (count > 0)[:, None] & valid[None, :]
    count = count.to(tl.float32)[:, None]
    means = tl.load(partials_at(partials, 0, part, channels, c, CHUNKS), mask=filled, other=0.0)
    squares = tl.load(partials_at(partials, 1, part, channels, c, CHUNKS), mask=filled, other=0.0)
    mean = tl.sum(means * count, 0) / size
    deviation = means - mean[None, :]
    total = tl.sum(squares + count * deviation * deviation, 0)
    rstd = 1.0 / tl.sqrt_rn(total / size + eps)
    if chunk == 0:
        own = part * channels + c
        tl.store(stats + own, mean, mask=valid)
        tl.store(stats + tl.num_programs(2) * channels + own, total / (size - 1), mask=valid)
        tl.store(rstd_out + own, rstd, mask=valid)
    scale = rstd * tl.load(weight + c, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=valid, other=0.0).to(tl.float32)
    for start in range(first, end, BLOCK_N):
        at, mask = tile(part, size, channels, start + tl.arange(0, BLOCK_N), end, c, valid)
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        out = (values - mean[None, :]) * scale[None, :] + shift[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def sums(
    x, grad, stats, partials, size, channels, rows,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes each chunk's sums of grad, and of grad * (x - mean)."""
    part, chunk, c, valid, first, end = place(size, channels, rows, BLOCK_C)
    mean = tl.load(stats + part * channels + c, mask=valid, other=0.0)
    total, weighted = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_N):
        at, mask = tile(part, size, channels, start + tl.arange(0, BLOCK_N), end, c, valid)
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(g, 0)
        weighted += tl.sum(g * (values - mean[None, :]), 0)
    store_partial(partials, 0, part, chunk, channels, c, valid, total, CHUNKS)
    store_partial(partials, 1, part, chunk, channels, c, valid, weighted, CHUNKS)


@triton.jit
def merged_sums(partials, part, channels, rows, size, c, valid, CHUNKS: tl.constexpr):
    """Returns a part's sums of grad, and of grad * (x - mean), [BLOCK_C]."""
    mask = (tl.arange(0, CHUNKS) * rows < size)[:, None] & valid[None, :]
    total = tl.load(partials_at(partials, 0, part, channels, c, CHUNKS), mask=mask, other=0.0)
    weighted = tl.load(partials_at(partials, 1, part, channels, c, CHUNKS), mask=mask, other=0.0)
    return tl.sum(total, 0), tl.sum(weighted, 0)


@triton.jit
def backward(
    x, grad, weight, stats, rstds, partials, grad_x, grad_weight, grad_bias,
    size, channels, rows,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of x, and of weight and bias, which are sums over the parts."""
    part, chunk, c, valid, first, end = place(size, channels, rows, BLOCK_C)
    if (chunk == 0) & (part == 0):
        all_weighted, all_total = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
        for p in range(tl.num_programs(2)):
            total, weighted = merged_sums(partials, p, channels, rows, size, c, valid, CHUNKS)
            all_weighted += weighted * tl.load(rstds + p * channels + c, mask=valid, other=0.0)
            all_total += total
        tl.store(grad_weight + c, all_weighted.to(grad_weight.dtype.element_ty), mask=valid)
        tl.store(grad_bias + c, all_total.to(grad_bias.dtype.element_ty), mask=valid)
    mean = tl.load(stats + part * channels + c, mask=valid, other=0.0)
    rstd = tl.load(rstds + part * channels + c, mask=valid, other=0.0)
    total, weighted = merged_sums(partials, part, channels, rows, size, c, valid, CHUNKS)
    scale = rstd * tl.load(weight + c, mask=valid, other=0.0).to(tl.float32)
    offset, slope = total / size, rstd * rstd * weighted / size
    for start in range(first, end, BLOCK_N):
        at, mask = tile(part, size, channels, start + tl.arange(0, BLOCK_N), end, c, valid)
        values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        out = scale[None, :] * (g - offset[None, :] - (values - mean[None, :]) * slope[None, :])
        tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=mask)
