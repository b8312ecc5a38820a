"""Validation: the checks of every argument, and the choice of the compute dtype.

The checks concern shapes, dtypes, devices and Python numbers. A value in memory is read only
where that is free: on the CPU, outside torch.compile and torch.func.
"""

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, int64, nn, strided

from relssl._compat import in_functorch_transform
from relssl.backends.common import Temperature, autocasts, device_type
from relssl.queue import FLOATS, FeatureQueue, refuse_dtensor

T = TypeVar("T")


def savable(t: T) -> T:
    """Returns t, or a copy of a tensor made under inference mode, which autograd would refuse to save."""
    if isinstance(t, Tensor) and not torch.compiler.is_compiling() and t.is_inference():
        return t.clone()  # type: ignore[return-value]
    return t


def is_readable(t: Tensor) -> bool:
    """Whether a value exists and is free to read; a subclass, such as FakeTensor, may have none."""
    plain = type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu"
    return plain and not torch.compiler.is_compiling() and not in_functorch_transform()


def _rows(name: str, t: Tensor, shapes: dict[int, str]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
    if type(t) is not Tensor:
        refuse_dtensor(name, t)
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {t.layout}")
    if t.dim() not in shapes:
        tokens = f"; for tokens [B, N, D] pass {name}.flatten(0, 1)" if t.dim() == 3 else ""
        raise ValueError(f"{name} must be {' or '.join(shapes.values())}, got shape {tuple(t.shape)}{tokens}")
    if t.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(t.shape)}")


def _temperature(name: str, value: Temperature, device: torch.device) -> Temperature:
    """Returns the temperature: as it is, or a tensor's one element as a 0-d tensor."""
    number = value
    if isinstance(value, float):  # first, as the usual case
        pass
    elif isinstance(value, Tensor):
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be a number or a floating-point tensor, got {value.dtype}")
        if value.numel() != 1:
            got = tuple(value.shape)
            raise ValueError(f"{name} must be a number or a tensor of one element, got shape {got}")
        _same_device(name, value, device)
        scalar: Tensor = savable(value.reshape(()) if value.dim() else value)
        if not is_readable(scalar):
            return scalar
        value, number = scalar, scalar.item()
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        if not isinstance(value, (np.floating, np.integer)):
            raise TypeError(f"{name} must be a number or a tensor of one element, got {type(value).__name__}")
        value = number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return value


def _same_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise RuntimeError(f"{name} is on {t.device}, but expected on {device} like the first argument")


def queue_rows(
    queue: Tensor | FeatureQueue, ids: Tensor | None, queue_ids: Tensor | None, backend: str
) -> tuple[Tensor, tuple[Tensor | None, ...], str]:
    """Returns the rows of a queue, what is excluded from it, () or (ids, queue_ids, filled), unchecked, and
    the backend for it.

    Raises ValueError where one of ids and queue_ids has no counterpart, and RuntimeError for a sharded queue
    of other processes.
    """
    rows, filled = queue, None
    if isinstance(queue, FeatureQueue):
        if queue_ids is not None:
            raise ValueError("queue_ids must be None: a FeatureQueue keeps its own (ids=True)")
        rows, filled = queue.rows, queue.filled
        if queue.sharded:
            backend = queue._backend(backend)
        if ids is not None:
            queue_ids = queue.ids
            if queue_ids is None:
                raise ValueError("ids must be None: the queue keeps none (FeatureQueue's ids=True)")
    elif (ids is None) != (queue_ids is None):
        raise ValueError("ids and queue_ids must be given together where queue is a tensor")
    if ids is None:
        return rows, () if filled is None else (None, None, filled), backend  # type: ignore[return-value]
    return rows, (ids, queue_ids, filled), backend  # type: ignore[return-value]


def check_exclude(x: Tensor, queue: Tensor, exclude: tuple[Tensor | None, ...]) -> None:
    """Checks ids and queue_ids for x [..., B, D]. Raises TypeError, ValueError or RuntimeError."""
    ids, queue_ids, _ = exclude
    if ids is not None and queue_ids is not None:
        device = x.device
        _indices("ids", ids, x.shape[-2], "B", device)
        _indices("queue_ids", queue_ids, queue.shape[0], "K", device)


def _indices(name: str, t: Tensor, count: int, shape: str, device: torch.device) -> None:
    if not isinstance(t, Tensor) or t.dtype != int64:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be an int64 tensor, got {got}")
    refuse_dtensor(name, t)
    if t.layout != strided:
        raise TypeError(f"{name} must be a dense tensor, got {t.layout}")
    if t.shape != (count,):
        raise ValueError(f"{name} must be [{shape}] = [{count}], got shape {tuple(t.shape)}")
    if t.device != device:  # The call would cost more than the comparison.
        _same_device(name, t, device)


def check_queue(name: str, x: Tensor, queue: Tensor, shapes: dict[int, str]) -> None:
    """Checks x (called `name`) against a queue [K, D]. Raises TypeError, ValueError or RuntimeError."""
    _rows(name, x, shapes)
    _rows("queue", queue, {2: "[K, D]"})
    _same_device("queue", queue, x.device)
    if queue.shape[1] != x.shape[-1]:
        raise ValueError(f"queue has rows of width {queue.shape[1]}, but {name} of width {x.shape[-1]}")


def check_pair(q: Tensor, k: Tensor, queue: Tensor, **temperatures: Temperature) -> list[Temperature]:
    """Checks a query batch q, its keys k and a queue; returns the temperatures as scalars.

    Raises TypeError, ValueError or RuntimeError.
    """
    check_queue("q", q, queue, {2: "[B, D]", 3: "[V, B, D]"})
    _rows("k", k, {2: "[B, D]"})
    _same_device("k", k, q.device)
    if k.shape != (q.shape if q.dim() == 2 else q.shape[1:]):
        tokens = "; for tokens [B, N, D] pass q.flatten(0, 1), too" if q.dim() == 3 else ""
        raise ValueError(
            f"k must have the last two dimensions of q {tuple(q.shape)}, got {tuple(k.shape)}{tokens}"
        )
    return [_temperature(name, t, q.device) for name, t in temperatures.items()]


def check_views(
    z1: Tensor,
    z2: Tensor,
    queue: Tensor | None,
    names: tuple[str, str],
    shape: str,
    **temperatures: Temperature,
) -> list[Temperature]:
    """Checks two views of a batch, which errors name so, and a queue unless it is None; returns the
    temperatures as scalars.

    Raises TypeError, ValueError or RuntimeError.
    """
    first, second = names
    _rows(first, z1, {2: shape})
    _rows(second, z2, {2: shape})
    _same_device(second, z2, z1.device)
    if z2.shape != z1.shape:
        raise ValueError(f"{second} must have the shape of {first} {tuple(z1.shape)}, got {tuple(z2.shape)}")
    if queue is not None:
        check_queue(first, z1, queue, {2: shape})
    return [_temperature(name, t, z1.device) for name, t in temperatures.items()]


def check_logsumexp(
    x: Tensor, queue: Tensor, temperature: Temperature, exclude: Tensor | None, size: int
) -> Temperature:
    """Checks the arguments of queue_logsumexp; returns the temperature as a scalar.

    size: the number of rows of the whole queue, which the indices to exclude refer to.

    Raises TypeError, ValueError or RuntimeError.
    """
    check_queue("x", x, queue, {2: "[R, D]"})
    temperature = _temperature("temperature", temperature, x.device)
    if exclude is None:
        return temperature
    _indices("exclude", exclude, len(x), "R", x.device)
    if is_readable(exclude):
        low, high = (int(v) for v in exclude.aminmax())
        if low < -1 or high >= size:
            raise ValueError(f"exclude must lie in [-1, {size}), got values from {low} to {high}")
    return temperature


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def compute_dtype(x: Tensor, queue: Tensor) -> torch.dtype:
    """Returns the queue's dtype if that is 16-bit; else, under autocast, the autocast dtype; else x's.

    Like torch's own autocast, float64 input is left alone.
    """
    if queue.dtype in (torch.bfloat16, torch.float16):
        return queue.dtype
    if x.dtype != torch.float64 and autocasts(device_type(x)):
        return torch.get_autocast_dtype(device_type(x))
    return x.dtype
