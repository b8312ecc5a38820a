"""SIMD C++ (csrc/cpu): the whole loss in one native call, on all of torch's threads.

Picks the instruction set at run time: "cpu" is the best there is, or the one that RELSSL_CPU_ISA names, and
"cpu/avx2", for example, that one. Here tensors become addresses: dtypes and shapes have been checked, and
what has no contiguous rows is copied once.
"""

import os
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from relssl.backends.common import Scale, dense, flat

try:
    from relssl import _cpu  # type: ignore[attr-defined]
except ImportError as error:
    _cpu = None
    _missing = f"relssl._cpu is not built ({error})"
else:
    if os.environ.get("RELSSL_CPU_ISA"):
        _cpu.use(os.environ["RELSSL_CPU_ISA"])


def supports(device: str, dtype: torch.dtype, dim: int) -> str | None:
    if device != "cpu":
        return f"it runs on the CPU, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None if _cpu else _missing


def variants(dtype: torch.dtype, dim: int) -> list[str]:
    emulated = "emulated"  # built for tests alone
    return [name for name in _cpu.instruction_sets() if name not in (_cpu.instruction_set(), emulated)]


def unsupported_variant(variant: str, dtype: torch.dtype, dim: int) -> str | None:
    if variant in (sets := _cpu.instruction_sets()):
        return None
    return f"it has the instruction sets {', '.join(sets)} here, not {variant!r}"


def variant(name: str) -> SimpleNamespace:
    return SimpleNamespace(**{run.__name__: partial(run, isa=name) for run in (rows, relation, vjp)})


def rows(
    x: Tensor, queue: Tensor, scale: Scale, split: int, exclude: Tensor | None, want_mean: bool, isa: str = ""
) -> tuple[Tensor, Tensor]:
    x, queue = dense(x), dense(queue)
    count, dim = x.shape
    lse = x.new_empty(2, count, dtype=torch.float32)
    mean = x.new_empty(count, dim if want_mean else 0, dtype=torch.float32)
    exclude = exclude if exclude is None else exclude.contiguous()
    first, second, rest = _stack(x, scale[0]), NONE, 0
    if split < count:  # Slices take as long as all else here.
        first, second = _stack(x[:split], scale[0]), _stack(x[split:], scale[1])
        rest = mean[split:].data_ptr()
    means = (mean.data_ptr(), rest) if want_mean else (0, 0)
    _cpu.lse_and_mean(
        first, second, *_queue(queue), _address(exclude), lse.data_ptr(), *means, torch.get_num_threads(), isa
    )
    return lse, mean


def relation(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    scale: Scale,
    form: str,
    weight: float | None,
    want_grad: bool,
    isa: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, dim = k.shape
    shape, kind = q.shape, torch.float32
    q, k, queue = flat(q), dense(k), dense(queue)
    count = q.shape[0]
    loss = q.new_empty(shape[:-1] if weight is None else (), dtype=kind)
    entropy = q.new_empty(batch, dtype=kind)
    grad_q = q.new_empty(shape if want_grad else (count, 0), dtype=kind)
    lse, mean_t = q.new_empty(2, batch + count, dtype=kind), q.new_empty(batch, dim, dtype=kind)
    _cpu.relation(
        _stack(k, scale[1]),
        _stack(q, scale[0]),
        *_queue(queue),
        form == "kl",
        1.0 if weight is None else weight,
        weight is not None,
        loss.data_ptr(),
        entropy.data_ptr(),
        grad_q.data_ptr() if want_grad else 0,
        lse.data_ptr(),
        mean_t.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return loss, entropy, grad_q, lse, mean_t


def vjp(
    x: Tensor,
    queue: Tensor,
    scale: float | Tensor,
    exclude: Tensor | None,
    lse: Tensor,
    mean: Tensor | None,
    g_lse: Tensor | None,
    g_mean: Tensor | None,
    g_row: Tensor | None,
    want_x: bool,
    want_queue: bool,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    x, queue = dense(x), dense(queue)
    grad_x, grad_queue = (
        t.new_empty(t.shape[0] if wanted else 0, t.shape[1], dtype=torch.float32)
        for t, wanted in ((x, want_x), (queue, want_queue))
    )
    # Held by name, so that a copy made here lives as long as its address is in use.
    given = [t if t is None else t.contiguous() for t in (exclude, lse, mean, g_lse, g_mean, g_row)]
    _cpu.vjp(
        _stack(x, scale),
        *_queue(queue),
        *(_address(t) for t in given),
        grad_x.data_ptr() if want_x else 0,
        grad_queue.data_ptr() if want_queue else 0,
        torch.get_num_threads(),
        isa,
    )
    return grad_x, grad_queue


NONE = 0, 0, 0, 0.0  # a stack without rows


def _stack(x: Tensor, scale: float | Tensor) -> tuple[int, int, int, float]:
    return x.data_ptr(), x.stride(0), x.shape[0], float(scale)


def _queue(queue: Tensor) -> tuple[int, int, int, int, bool]:
    return queue.data_ptr(), queue.stride(0), *queue.shape, queue.dtype == torch.bfloat16


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
