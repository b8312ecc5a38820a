"""lse, mean and their vector-Jacobian product through torch.mm, one tile of the queue after the other.

Each tile yields a log-sum-exp and a mean of its own, and two of these merge by logaddexp; nothing of
size R×K exists. Small problems are bound by the number of torch calls, so there are few.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from relssl.backends.common import Cotangents, Exclude, Saved, Scale, accumulator, to_dtype

# Elements of a similarity tile. On the CPU 2 MiB of float32: near the L2 cache, and past 4 MiB the allocator
# returns memory to the system after every tile. The GPU's figure is a guess, and so is the limit of 2,048
# columns for few rows: shorter sums, at about a tenth more time than 8,192 at 128 rows.
TILE_CPU, TILE_GPU = 2**19, 2**23


def tile_size(x: Tensor) -> int:
    """Returns the elements of a similarity tile on the device of x."""
    return TILE_CPU if x.is_cpu else TILE_GPU


def lse_and_mean(
    theta: Tensor, queue: Tensor, exclude: Exclude | None, want_mean: bool
) -> tuple[Tensor, Tensor]:
    """Returns lse [2, R] and mean [R, D], or [R, 0], of scaled rows."""
    high: Tensor  # Not one sum: see the contract.
    low: Tensor
    mean: Tensor
    for columns, tile, logits in _tiles(theta, queue, exclude):
        p = logits.softmax(1)
        # The largest probability is exp(largest logit - lse).
        part_high, part_low = logits.amax(1), p.amax(1).log_().neg_()
        if exclude is not None:  # A row for which all is excluded has the sum 0 beside a finite shift.
            empty = part_high == -torch.inf
            p.masked_fill_(empty[:, None], 0)
            part_low.masked_fill_(empty, -torch.inf)
            part_high.masked_fill_(empty, torch.finfo(p.dtype).min)
        part_mean = torch.mm(p, tile) if want_mean else p[:, :0]
        if columns.start == 0:
            high, low, mean = part_high, part_low, part_mean
            continue
        largest = torch.maximum(high, part_high)
        low += high.sub_(largest)
        part_low += part_high.sub_(largest)
        high, total = largest, torch.logaddexp(low, part_low)
        if want_mean:
            finite = total if exclude is None else total.clamp_min(torch.finfo(total.dtype).min)
            mean.mul_(low.sub_(finite).exp_()[:, None])
            mean.addcmul_(part_mean, part_low.sub_(finite).exp_()[:, None])
        low = total
    return torch.stack((high, low)), mean


def vjp(saved: Saved, cotangents: Cotangents, want_x: bool, want_queue: bool) -> tuple[Tensor, Tensor]:
    """Computes Backend.vjp."""
    x, queue, scale, exclude, lse, mean = saved
    g_mean, g_row = cotangents.g_mean, cotangents.g_row
    theta = (x.to(accumulator(x.dtype)) * scale).contiguous()
    high, low = lse[:, :, None]
    g_lse = torch.zeros_like(high) if cotangents.g_lse is None else cotangents.g_lse[:, None]
    base = g_lse  # w = p (base + u)
    mean = theta[:0] if mean is None else mean  # It is not read then.
    if g_mean is not None:
        base = base - (mean * g_mean).sum(1, keepdim=True)

    def weights() -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        for columns, tile, logits in _tiles(theta, queue, exclude):
            p = logits.sub_(high).sub_(low).exp_()
            if exclude is not None:  # Where all is excluded: exp(-inf - -inf).
                p.masked_fill_(high + low == -torch.inf, 0)
            w = p * base if g_mean is None else torch.addmm(base, g_mean, tile.T).mul_(p)
            yield columns, tile, p, w

    grad_x = grad_queue = theta[:0]
    if want_x or g_mean is not None:
        # sum_j w_j must be g_lse. What rounding leaves, r, goes out along the mean: without it a
        # sharp row loses every digit, since u_j - ubar nearly vanishes where p_j does not.
        total = torch.zeros_like(base)
        grad_x = torch.zeros_like(theta)
        for _, tile, _, w in weights():
            total += w.sum(1, keepdim=True)
            grad_x.addmm_(w, tile)
        r = total - g_lse
        grad_x = (grad_x - r * mean) * scale if want_x else theta[:0]
        base = base - r
    if want_queue:
        grad_queue = theta.new_empty(queue.shape)
        for columns, _, p, w in weights():
            torch.mm(w.T, theta, out=grad_queue[columns])
            if g_row is not None:
                grad_queue[columns].addmm_(p.T, g_row)
    return grad_x, grad_queue


def nt_xent_vjp(z: Tensor, scale: Scale, lse: Tensor, g: Tensor) -> Tensor:
    """Computes Backend.nt_xent_vjp."""
    x = to_dtype(z, accumulator(z.dtype))
    theta, own = x * scale[0], torch.arange(len(z), device=z.device)
    high, low = lse
    grad = -positive_terms(x, g)
    for columns, tile, logits in _tiles(theta, z, Exclude(own, None, None)):
        p = (logits - high[:, None]).sub_(low[:, None]).exp_().mul_(g[:, None])
        p_mirrored = logits.sub_(high[columns]).sub_(low[columns]).exp_().mul_(g[columns])
        grad.addmm_(p.add_(p_mirrored), tile)
    return grad.mul_(scale[0])


def positive_terms(x: Tensor, g: Tensor) -> Tensor:
    """Returns (g_i + g_i') x_i', where i' is the other view of row i."""
    half = len(x) // 2
    return x.roll(half, 0) * (g + g.roll(half))[:, None]


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """Returns the log-sum-exp [2, R] of two of them, in two parts as they are."""
    high = torch.maximum(a[0], b[0])
    return torch.stack((high, torch.logaddexp(a[1] + (a[0] - high), b[1] + (b[0] - high))))


def _tiles(theta: Tensor, queue: Tensor, exclude: Exclude | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields (columns, queue tile [T, D], logits [R, T])."""
    size, dtype = queue.shape[0], theta.dtype
    width = max(128, min(2048, tile_size(theta) // theta.shape[0]))
    for start in range(0, size, width):
        stop = min(start + width, size)
        tile = to_dtype(queue if width >= size else queue[start:stop], dtype)
        unused = None if exclude is None else exclude.unused(start, stop)
        if unused is not None:  # 0 times NaN is NaN.
            tile = tile.masked_fill(unused[:, None], 0)
        logits = torch.mm(theta, tile.T)
        if exclude is not None:
            _exclude_ids(exclude, start, stop, logits)
        if unused is not None:
            logits.masked_fill_(unused, -torch.inf)
        yield slice(start, stop), tile, logits


def _exclude_ids(exclude: Exclude, start: int, stop: int, logits: Tensor) -> None:
    """Sets the logits [R, T] of the queue rows from `start` to `stop` that are excluded by ids to -inf."""
    ids, queue_ids, _ = exclude
    if ids is not None and queue_ids is None:
        own = (ids - start)[:, None]
        at = own.clamp(0, stop - start - 1)
        logits.scatter_(1, at, logits.gather(1, at).masked_fill_(own == at, -torch.inf))
    elif ids is not None and queue_ids is not None:
        of_rows = ids[:, None]
        logits.masked_fill_((of_rows == queue_ids[start:stop]) & (of_rows >= 0), -torch.inf)
