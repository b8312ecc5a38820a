"""What the backends share: the types of their arguments, and the dtype they sum in."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

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


def without_autocast(run: Callable) -> Callable:
    """Run a function of tensors with autocast off: their dtypes have been chosen."""

    @wraps(run)
    def guarded(x: Tensor, *args: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return run(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *args)

    return guarded
