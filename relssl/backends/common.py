"""What the backends share: the types of their arguments, and the dtype they sum in."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Temperature = float | Tensor
Scale = list[float] | Tensor  # 1/temperature: by value, or on the device


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hold(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to dtype but held in the accumulator's dtype, and so is its gradient, unrounded."""
    wide = accumulator(dtype)
    if x.dtype != wide or dtype == wide:
        return x.to(dtype).to(wide)
    return x + (x.to(dtype).to(wide) - x).detach()  # The sum is exact, and passes the gradient by.


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), without the microseconds that a call takes where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def dense(t: Tensor) -> Tensor:
    """t [R, D] with contiguous rows, whatever lies between them."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def flat(q: Tensor) -> Tensor:
    """q [B, D] or [V, B, D] as contiguous rows [V*B, D]."""
    return dense(q if q.dim() == 2 else q.reshape(-1, q.shape[-1]))


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a device type; torch raises for one that has none, such as "meta"."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(run: Callable) -> Callable:
    """Run a function of tensors with autocast off: their dtypes have been chosen."""

    @wraps(run)
    def guarded(x: Tensor, *args: Any) -> Any:
        if not autocasts(x.device.type):
            return run(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *args)

    return guarded


def total(rows: Tensor, weight: float, out: Tensor | None = None) -> Tensor:
    """weight times the sum of the rows, 0-d: one call where that is their sum or their mean."""
    if weight == 1 / rows.numel():
        return rows.mean() if out is None else torch.mean(rows, None, out=out)
    found = torch.sum(rows, None, out=out)
    return found if weight == 1 else found.mul_(weight)


def info_nce(
    rows: Callable, q: Tensor, k: Tensor, queue: Tensor, scale: Scale, weight: float | None, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the contract calls info_nce, for a backend that has `rows` only."""
    x = q.flatten(0, -2)
    both = scale.expand(2) if isinstance(scale, Tensor) else [*scale, *scale]
    lse, mean = rows(x, queue, both, x.shape[0], None, want_grad)
    kind = lse.dtype
    positive = (cast(q, kind) * cast(k, kind)).sum(-1) * scale[0]
    # With 0 times itself: an infinite one becomes NaN, as in a softmax with it.
    positive = torch.add(positive, positive, alpha=0)
    high, low = lse.view(2, *positive.shape)
    z = high - positive + low
    sigma, grad_q = z.sigmoid(), mean
    if want_grad:
        c = scale[0] if weight is None else weight * scale[0]
        grad_q = (mean.view(q.shape) - k).mul_((sigma * c)[..., None])
    loss = functional.softplus(z, threshold=40)
    return loss if weight is None else total(loss, weight), sigma, grad_q, lse
