"""The rows of every process over a queue of which each process holds a shard.

It is a backend around a backend: rows are gathered, each process computes log-sum-exp and mean over its
shard, one all-to-all returns these partials, and each process merges those of its own rows in the order of
the ranks. With parts s of a queue, A(theta) = log sum_s exp A_s(theta) and

    mean = sum_s share_s mean_s,   share_s = exp(A_s - A)

Every process must call the same losses in the same order, with the same temperatures.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from relssl.backends.base import Backend, twice
from relssl.backends.common import Cotangents, Exclude, Saved, Scale
from relssl.groups import Group, all_gather, all_to_all

PREFIX = "sharded/"


def shard_rows(size: int, shards: int) -> int:
    """Returns the rows of a shard; those of the last shards are fewer where they do not divide the queue."""
    return -(-size // shards)


class Sharding(NamedTuple):
    """How a queue is divided; what the name of a backend says of it.

    Attributes:
        size: the number of rows of the whole queue.
        uneven: whether processes may have different numbers of rows.
        group: the processes.
    """

    size: int
    uneven: bool
    group: Group

    def prefix(self) -> str:
        """Returns what precedes the name of the backend that computes."""
        return f"{PREFIX}{self.size}/{'uneven' if self.uneven else 'even'}/{self.group.name}/"

    @staticmethod
    def split(name: str) -> tuple["Sharding", str]:
        """Returns the sharding and the name of the backend that computes."""
        _, size, uneven, group, inner = name.split("/", 4)
        return Sharding(int(size), uneven == "uneven", Group(group)), inner


def is_sharded(name: str) -> bool:
    return isinstance(name, str) and name.startswith(PREFIX)


class Sharded(Backend):
    """A backend for rows of all processes and the shard of this one."""

    def __init__(self, sharding: Sharding, inner: Backend) -> None:
        self.sharding, self._inner = sharding, inner

    @property
    def local(self) -> Backend:
        return self._inner

    def supports(self, device: str, dtype: torch.dtype, dim: int) -> str | None:
        return self.local.supports(device, dtype, dim)

    def num_rows(self, queue: Tensor) -> int:
        return self.sharding.size

    def lse_and_mean(
        self, x: Tensor, queue: Tensor, scale: Scale, num_first: int, exclude: Exclude | None, want_mean: bool
    ) -> tuple[Tensor, Tensor]:
        rows = _Rows(self.sharding, num_first, x)
        lse, mean = self.local.lse_and_mean(
            rows.gather(x), queue, scale, rows.num_first, self._exclude(exclude, rows, queue), want_mean
        )
        return merge(rows.give_back(torch.cat((mean, lse.T), 1)))

    def vjp(
        self, saved: Saved, cotangents: Cotangents, want_x: bool, want_queue: bool
    ) -> tuple[Tensor, Tensor]:
        """Passes the gradients through `merge` to log-sum-exp and mean over this process's shard:

        share_s (g_lse + <mean_s - mean, g_mean>) and share_s g_mean.
        """
        x, queue, scale, exclude, lse, mean = saved
        g, rows = cotangents, _Rows(self.sharding, len(x), x)
        all_x, own = rows.gather(x), self._exclude(exclude, rows, queue)
        high, low, g_lse, g_mean, g_row, mean = rows.gather_columns(
            *lse, g.g_lse, g.g_mean, g.g_row, None if g.g_mean is None else mean
        )
        want_mean = want_x or g_mean is not None
        pair = twice(scale.reshape(1) if isinstance(scale, Tensor) else [scale])
        own_lse, own_mean = self.local.lse_and_mean(all_x, queue, pair, len(all_x), own, want_mean)
        share = (own_lse[0] - high + (own_lse[1] - low)).exp_()
        share.masked_fill_(own_lse.sum(0) == -torch.inf, 0)  # Nothing of this shard, or of any.
        if g_mean is not None:
            along = ((own_mean - mean) * g_mean).sum(1)
            g_lse, g_mean = along if g_lse is None else g_lse + along, g_mean * share[:, None]
        of_shard = Cotangents(
            None if g_lse is None else g_lse * share,
            g_mean,
            None if g_row is None else g_row * share[:, None],
        )
        of_saved = Saved(all_x, queue, scale, own, own_lse, own_mean if want_mean else None)
        grad_x, grad_queue = self.local.vjp(of_saved, of_shard, want_x, want_queue)
        return rows.give_back(grad_x).sum(0) if want_x else grad_x, grad_queue

    def _exclude(self, exclude: Exclude | None, rows: "_Rows", queue: Tensor) -> Exclude | None:
        """Returns what the gathered rows exclude of this process's shard."""
        if exclude is None or exclude.ids is None:
            return exclude
        ids = rows.gather(exclude.ids)
        if exclude.queue_ids is not None:
            return exclude._replace(ids=ids)
        # They are indices of the whole queue.
        first = self.sharding.group.rank * shard_rows(self.sharding.size, self.sharding.group.size)
        indices = torch.arange(first, first + len(queue), device=ids.device)
        return exclude._replace(ids=ids, queue_ids=indices)


class _Rows:
    """The stacked rows of all processes: by rank the first ones, which have one scale, then the others."""

    def __init__(self, sharding: Sharding, num_first: int, x: Tensor) -> None:
        self.group = sharding.group
        own = num_first, len(x) - num_first
        self.counts = self.group.counts("the rows of a loss", own, x, sharding.uneven)
        self.totals = [sum(count) for count in self.counts]
        self.own = len(x)
        self.num_first = sum(first for first, _ in self.counts)
        self.mixed = any(first and second for first, second in self.counts)

    def gather(self, t: Tensor) -> Tensor:
        """Returns the rows [N, ...] of all processes for this process's [R, ...]."""
        found = all_gather(t, self.group, self.totals)
        if not self.mixed:
            return found
        blocks = [b.split(count) for b, count in zip(found.split(self.totals), self.counts, strict=True)]
        return torch.cat([block[part] for part in (0, 1) for block in blocks])

    def gather_columns(self, *columns: Tensor | None) -> list[Any]:
        """Calls `gather` once for tensors [R] and [R, D], of which some may be None."""
        given = [t[:, None] if t.dim() == 1 else t for t in columns if t is not None]
        found = iter(self.gather(torch.cat(given, 1)).split([t.shape[1] for t in given], 1))
        return [t if t is None else next(found).reshape(-1, *t.shape[1:]) for t in columns]

    def give_back(self, parts: Tensor) -> Tensor:
        """Returns results [W, R, C] of the own rows over every shard, from those [N, C] of all rows."""
        if self.mixed:
            firsts, seconds = zip(*self.counts, strict=True)
            blocks = parts.split([*firsts, *seconds])
            pairs = zip(blocks[: len(firsts)], blocks[len(firsts) :], strict=True)
            parts = torch.cat([block for pair in pairs for block in pair])
        received = all_to_all(parts, self.group, self.totals, [self.own] * len(self.totals))
        return received.view(len(self.totals), self.own, parts.shape[1])


def merge(partials: Tensor) -> tuple[Tensor, Tensor]:
    """Returns lse [2, R] and mean [R, D] over all shards from [W, R, D + 2]: mean and lse over each shard."""
    mean, high, low = partials[..., :-2], partials[..., -2], partials[..., -1]
    smallest = torch.finfo(high.dtype).min
    empty = high + low == -torch.inf
    high, low = high.masked_fill(empty, smallest), low.masked_fill(empty, -torch.inf)
    largest = high.amax(0)
    low += high - largest
    total = low.logsumexp(0)
    share = (low - total.clamp_min(smallest)).exp_()
    return torch.stack((largest, total)), (mean * share[..., None]).sum(0)
