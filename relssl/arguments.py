"""What callers may pass: the checks of every argument and the choice of the compute dtype.

Everything here looks at shapes, dtypes, devices and Python numbers. A value in memory is read only
where that is free: on the CPU, outside torch.compile and torch.func.
"""

import math

import torch
from torch import Tensor

from relssl.backends.common import Temperature
from relssl.queue import FeatureQueue

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

try:  # Private, so guarded: tells which torch.func transform is running, if any.
    from torch._C._functorch import peek_interpreter_stack
except ImportError:
    peek_interpreter_stack = None  # type: ignore[assignment]


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, which only plain torch code supports."""
    if torch.compiler.is_compiling():
        return False
    if peek_interpreter_stack is not None and peek_interpreter_stack() is not None:
        return True
    return torch.autograd.forward_ad._current_level >= 0


def _readable(t: Tensor) -> bool:
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def _rows(name: str, t: Tensor, shapes: dict[int, str]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
    if t.dim() not in shapes:
        raise ValueError(f"{name} must be {' or '.join(shapes.values())}, got shape {tuple(t.shape)}")
    if 0 in t.shape:
        raise ValueError(f"{name} is empty: shape {tuple(t.shape)}")


def _temperature(name: str, value: Temperature, device: torch.device) -> None:
    if isinstance(value, Tensor):
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be a number or a floating-point tensor, got {value.dtype}")
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        _same_device(name, value, device)
        if not _readable(value):
            return
        value = value.item()
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _same_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise RuntimeError(f"{name} is on {t.device}, but expected on {device} like the first argument")


def queue_rows(queue: Tensor | FeatureQueue) -> Tensor:
    return queue.rows if isinstance(queue, FeatureQueue) else queue


def check_queue(name: str, x: Tensor, queue: Tensor, shapes: dict[int, str]) -> None:
    """x (called `name`) against a queue [K, D]. Raises TypeError, ValueError or RuntimeError."""
    _rows(name, x, shapes)
    _rows("queue", queue, {2: "[K, D]"})
    _same_device("queue", queue, x.device)
    if queue.shape[1] != x.shape[-1]:
        raise ValueError(f"queue has rows of width {queue.shape[1]}, but {name} of width {x.shape[-1]}")


def check_pair(q: Tensor, k: Tensor, queue: Tensor, **temperatures: Temperature) -> None:
    """A query batch q, its keys k and a queue. Raises TypeError, ValueError or RuntimeError."""
    check_queue("q", q, queue, {2: "[B, D]", 3: "[V, B, D]"})
    _rows("k", k, {2: "[B, D]"})
    _same_device("k", k, q.device)
    if k.dtype != q.dtype:
        raise TypeError(f"q and k must have one dtype, got {q.dtype} and {k.dtype}")
    if k.shape != q.shape[-2:]:
        raise ValueError(f"k must have the last two dimensions of q {tuple(q.shape)}, got {tuple(k.shape)}")
    for name, value in temperatures.items():
        _temperature(name, value, q.device)


def check_views(
    z1: Tensor, z2: Tensor, queue: Tensor | None, names: tuple[str, str], **temperatures: Temperature
) -> None:
    """Two views of a batch, so called, and perhaps a queue. Raises TypeError, ValueError or RuntimeError."""
    first, second = names
    _rows(first, z1, {2: "[N, D]"})
    _rows(second, z2, {2: "[N, D]"})
    _same_device(second, z2, z1.device)
    if z2.dtype != z1.dtype:
        raise TypeError(f"{first} and {second} must have one dtype, got {z1.dtype} and {z2.dtype}")
    if z2.shape != z1.shape:
        raise ValueError(f"{second} must have the shape of {first} {tuple(z1.shape)}, got {tuple(z2.shape)}")
    if queue is not None:
        check_queue(first, z1, queue, {2: "[N, D]"})
    for name, value in temperatures.items():
        _temperature(name, value, z1.device)


def check_lookup(x: Tensor, queue: Tensor, temperature: Temperature, exclude: Tensor | None) -> None:
    """The arguments of queue_logsumexp. Raises TypeError, ValueError or RuntimeError."""
    check_queue("x", x, queue, {2: "[R, D]"})
    _temperature("temperature", temperature, x.device)
    if exclude is None:
        return
    if not isinstance(exclude, Tensor) or exclude.dtype != torch.int64:
        kind = exclude.dtype if isinstance(exclude, Tensor) else type(exclude).__name__
        raise TypeError(f"exclude must be an int64 tensor, got {kind}")
    if exclude.shape != x.shape[:1]:
        raise ValueError(f"exclude must be [R] = [{len(x)}], got shape {tuple(exclude.shape)}")
    _same_device("exclude", exclude, x.device)
    if _readable(exclude):
        low, high = (int(v) for v in exclude.aminmax())
        if low < -1 or high >= len(queue):
            raise ValueError(f"exclude must lie in [-1, {len(queue)}), got values from {low} to {high}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def compute_dtype(x: Tensor, queue: Tensor) -> torch.dtype:
    """The queue's dtype if that is 16-bit; else, under autocast, the autocast dtype; else x's.

    Like torch's own autocast, float64 input is left alone.
    """
    if queue.dtype in (torch.bfloat16, torch.float16):
        return queue.dtype
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
