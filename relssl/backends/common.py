"""Helpers of all backends: the types of their arguments, dtypes and layouts."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Temperature = float | Tensor
Scale = list[float] | Tensor
"""1/temperature for each group of rows: by value, or on the device."""
F = TypeVar("F", bound=Callable)


class Exclude(NamedTuple):
    """The queue rows that are excluded: for each row of x those of its id, for all those not written yet.

    Attributes:
        ids: int64 [R], of the rows of x; a negative one matches nothing. None excludes nothing by ids.
        queue_ids: int64 [K], of the queue's rows; None stands for their indices.
        filled: int64, 0-d, on the device: the number of rows written so far, which come first; None uses all.
    """

    ids: Tensor | None
    queue_ids: Tensor | None
    filled: Tensor | None

    def of(self, rows: slice) -> "Exclude":
        """Returns the same for some of the rows."""
        return self if self.ids is None else self._replace(ids=self.ids[rows])

    def unused(self, start: int, stop: int) -> Tensor | None:
        """Returns which of these queue rows are not filled, bool [T]; None if all are in use."""
        if self.filled is None:
            return None
        return torch.arange(start, stop, device=self.filled.device) >= self.filled

    def mask(self, queue: Tensor) -> Tensor:
        """Returns where queue rows are excluded for rows of x, bool [R, K]; [1, K] where there are no ids."""
        index, unused = torch.arange(len(queue), device=queue.device), self.unused(0, len(queue))
        unused = (index < 0 if unused is None else unused)[None]
        if self.ids is None:
            return unused
        ids, queue_ids = self.ids[:, None], index if self.queue_ids is None else self.queue_ids
        return unused | (ids == queue_ids) & (ids >= 0)


class Saved(NamedTuple):
    """The arguments of Backend.lse_and_mean, with one scale for all rows, and its results.

    Attributes:
        x: rows [R, D].
        queue: [K, D].
        scale: 1/temperature, a number or a tensor on the device.
        exclude: the queue rows that are excluded, or None.
        lse: [2, R], two parts whose sum is the log-sum-exp.
        mean: [R, D], or None where it is not needed.
    """

    x: Tensor
    queue: Tensor
    scale: float | Tensor
    exclude: Exclude | None
    lse: Tensor
    mean: Tensor | None


@dataclass(frozen=True)
class Cotangents:
    """The gradients of a loss for lse and mean. None stands for zero.

    Attributes:
        g_lse: [R].
        g_mean: [R, D].
        g_row: [R, D], the factor of p in Backend.vjp's grad_queue: g_mean for the vjp of the primitive,
            and for a loss g_mean without the terms that cancel.
    """

    g_lse: Tensor | None = None
    g_mean: Tensor | None = None
    g_row: Tensor | None = None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums and results: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def straight_through_round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds x to dtype but keeps it in the accumulator's dtype, and its gradient unrounded."""
    wide = accumulator(dtype)
    if x.dtype != wide or dtype == wide:
        return x.to(dtype).to(wide)
    return x + (x.to(dtype).to(wide) - x).detach()  # The sum is exact, and the difference has no gradient.


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x.to(dtype), without the microseconds that a call takes where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def row_contiguous(t: Tensor) -> Tensor:
    """Returns t [R, D] with contiguous rows, which may lie apart."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def flat(q: Tensor) -> Tensor:
    """Returns q [B, D] or [V, B, D] as contiguous rows [V*B, D]."""
    return row_contiguous(q if q.dim() == 2 else q.reshape(-1, q.shape[-1]))


def device_type(x: Tensor) -> str:
    """Returns x.device.type; is_cpu is ten times as fast."""
    return "cpu" if x.is_cpu else x.device.type


def autocasts(device: str) -> bool:
    """Whether autocast is on for a device type; torch raises for one that has none, such as "meta"."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_off(device: torch.device) -> AbstractContextManager:
    """Returns a context in which autocast is off."""
    on = autocasts(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def without_autocast(run: F) -> F:
    """Runs a function of tensors with autocast off: their dtypes have been chosen."""

    @wraps(run)
    def guarded(x: Tensor, *args: Any) -> Any:
        if not autocasts(device_type(x)):
            return run(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *args)

    return guarded  # type: ignore[return-value]


def total(rows: Tensor, weight: float, out: Tensor | None = None) -> Tensor:
    """Returns weight times the sum of the rows, 0-d: one call where that is their sum or their mean."""
    if weight == 1 / rows.numel():
        return rows.mean() if out is None else torch.mean(rows, None, out=out)
    found = torch.sum(rows, None, out=out)
    return found if weight == 1 else found.mul_(weight)
