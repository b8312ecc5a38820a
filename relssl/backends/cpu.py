"""SIMD C++ (csrc/cpu): the whole loss in one native call, on all of torch's threads.

The instruction set is chosen at run time: "cpu" takes the best of the machine, or the one that RELSSL_CPU_ISA
names; "cpu/avx2", for example, takes AVX2. RELSSL_THREADS=own selects a pool of threads instead of torch's
OpenMP threads. Here tensors become addresses: dtypes and shapes have been checked, and rows that are not
contiguous are copied once.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from relssl.backends.base import Backend
from relssl.backends.common import Cotangents, Exclude, Saved, Scale, flat, row_contiguous

try:
    from relssl import _cpu  # type: ignore[attr-defined]
except ImportError as error:
    _cpu = None
    _missing = f"relssl._cpu is not built ({error})"
else:
    if os.environ.get("RELSSL_CPU_ISA"):
        _cpu.use(os.environ["RELSSL_CPU_ISA"])
    if os.environ.get("RELSSL_THREADS"):
        _cpu.use_threads(os.environ["RELSSL_THREADS"])


class Cpu(Backend):
    """SIMD C++ (csrc/cpu): the whole loss in one native call, on all of torch's threads."""

    def __init__(self, instruction_set: str = "") -> None:
        """ "" is the one that "cpu" stands for."""
        self.instruction_set = instruction_set

    def supports(self, device: str, dtype: torch.dtype, dim: int) -> str | None:
        if device != "cpu":
            return f"it runs on the CPU, not on {device}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        return None if _cpu else _missing

    def variants(self, dtype: torch.dtype, dim: int) -> list[str]:
        emulated = "emulated"  # built for tests alone
        return [name for name in _cpu.instruction_sets() if name not in (_cpu.instruction_set(), emulated)]

    def unsupported_variant(self, variant: str, dtype: torch.dtype, dim: int) -> str | None:
        if variant in (sets := _cpu.instruction_sets()):
            return None
        return f"it has the instruction sets {', '.join(sets)} here, not {variant!r}"

    def variant(self, name: str) -> "Cpu":
        return Cpu(name)

    def lse_and_mean(
        self, x: Tensor, queue: Tensor, scale: Scale, num_first: int, exclude: Exclude | None, want_mean: bool
    ) -> tuple[Tensor, Tensor]:
        x, queue = row_contiguous(x), row_contiguous(queue)
        queue, ids = (queue, NO_IDS) if exclude is None else _rows_and_ids(queue, exclude)
        count, dim = x.shape
        lse = x.new_empty(2, count, dtype=torch.float32)
        mean = lse.new_empty(count, dim if want_mean else 0)
        first, second, rest = _stack(x, scale[0]), NONE, 0
        if num_first < count:  # Slices take as long as all else here.
            first, second = _stack(x[:num_first], scale[0]), _stack(x[num_first:], scale[1])
            rest = mean[num_first:].data_ptr()
        means = (mean.data_ptr(), rest) if want_mean else (0, 0)
        _cpu.lse_and_mean(
            first,
            second,
            *_queue(queue),
            *ids.addresses,
            lse.data_ptr(),
            *means,
            torch.get_num_threads(),
            self.instruction_set,
        )
        return lse, mean

    def relation(
        self, q: Tensor, k: Tensor, queue: Tensor, scale: Scale, form: str, weight: float | None,
        want_grad: bool, exclude: Exclude | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        batch, dim = k.shape
        shape = q.shape
        q, k, queue = flat(q), row_contiguous(k), row_contiguous(queue)
        queue, ids = (queue, NO_IDS) if exclude is None else _rows_and_ids(queue, exclude)
        count = q.shape[0]
        loss = q.new_empty(shape[:-1] if weight is None else (), dtype=torch.float32)
        entropy, mean_t = loss.new_empty(batch), loss.new_empty(batch, dim)
        lse = loss.new_empty(2, batch + count)
        grad_q = loss.new_empty(shape if want_grad else (count, 0))
        _cpu.relation(
            _stack(k, scale[1]),
            _stack(q, scale[0]),
            *_queue(queue),
            *ids.addresses,
            form == "kl",
            1.0 if weight is None else weight,
            weight is not None,
            loss.data_ptr(),
            entropy.data_ptr(),
            grad_q.data_ptr() if want_grad else 0,
            lse.data_ptr(),
            mean_t.data_ptr(),
            torch.get_num_threads(),
            self.instruction_set,
        )
        return loss, entropy, grad_q, lse, mean_t

    def nt_xent(
        self, z: Tensor, scale: Scale, queue_lse: Tensor | None, weight: float | None, want_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, (rows, dim) = row_contiguous(z), z.shape
        loss = z.new_empty(rows if weight is None else (), dtype=torch.float32)
        lse, grad = loss.new_empty(2, rows), loss.new_empty(rows if want_grad else 0, dim)
        queue_lse = None if queue_lse is None else queue_lse.contiguous()
        _cpu.nt_xent(
            _stack(z, scale[0]),
            dim,
            z.dtype == torch.bfloat16,
            _address(queue_lse),
            1.0 if weight is None else weight,
            weight is not None,
            loss.data_ptr(),
            lse.data_ptr(),
            grad.data_ptr() if want_grad else 0,
            torch.get_num_threads(),
            self.instruction_set,
        )
        return loss, grad, lse

    def nt_xent_vjp(self, z: Tensor, scale: Scale, lse: Tensor, g: Tensor) -> Tensor:
        z, lse, g = row_contiguous(z), lse.contiguous(), g.contiguous()
        grad = lse.new_empty(z.shape)
        _cpu.nt_xent_vjp(
            _stack(z, scale[0]),
            z.shape[1],
            z.dtype == torch.bfloat16,
            lse.data_ptr(),
            g.data_ptr(),
            grad.data_ptr(),
            torch.get_num_threads(),
            self.instruction_set,
        )
        return grad

    def cluster_loss(
        self, p1: Tensor, p2: Tensor, scale: Scale, dtype: torch.dtype, penalize: bool, want_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, clusters = p1.shape
        if dtype != torch.float32 or count * clusters**2 > FEW:
            return super().cluster_loss(p1, p2, scale, dtype, penalize, want_grad)
        p1, p2 = p1.contiguous(), p2.contiguous()
        views = 2 if want_grad else 0
        loss, radial = p1.new_empty(()), p1.new_empty(views * clusters)
        grad = p1.new_empty(views, count, clusters)
        _cpu.cluster_loss(
            p1.data_ptr(),
            p2.data_ptr(),
            count,
            clusters,
            float(scale[0]),
            penalize,
            loss.data_ptr(),
            grad.data_ptr() if want_grad else 0,
            radial.data_ptr() if want_grad else 0,
        )
        return loss, grad, radial

    def vjp(
        self, saved: Saved, cotangents: Cotangents, want_x: bool, want_queue: bool
    ) -> tuple[Tensor, Tensor]:
        x, queue, exclude = row_contiguous(saved.x), row_contiguous(saved.queue), saved.exclude
        queue, ids = (queue, NO_IDS) if exclude is None else _rows_and_ids(queue, exclude)
        grad_x, grad_queue = (
            t.new_empty(t.shape[0] if wanted else 0, t.shape[1], dtype=torch.float32)
            for t, wanted in ((x, want_x), (saved.queue, want_queue))
        )
        if queue.shape[0] < saved.queue.shape[0] and want_queue:
            grad_queue[queue.shape[0] :] = 0  # of rows that are not filled
        # Kept by name, so that a copy made here lives as long as its address is in use.
        g = cotangents
        optional = saved.lse, saved.mean, g.g_lse, g.g_mean, g.g_row
        given = [t if t is None else t.contiguous() for t in optional]
        _cpu.vjp(
            _stack(x, saved.scale),
            *_queue(queue),
            *ids.addresses,
            *(_address(t) for t in given),
            grad_x.data_ptr() if want_x else 0,
            grad_queue.data_ptr() if want_queue else 0,
            torch.get_num_threads(),
            self.instruction_set,
        )
        return grad_x, grad_queue


NONE = 0, 0, 0, 0.0  # a stack without rows
FEW = 1 << 17  # images times squared clusters, up to which one thread needs a tenth of a millisecond


def _stack(x: Tensor, scale: float | Tensor) -> tuple[int, int, int, float]:
    return x.data_ptr(), x.stride(0), x.shape[0], float(scale)


class Ids(NamedTuple):
    """Those of rows and queue, kept while the kernels read their addresses."""

    tensors: tuple[Tensor | None, ...]
    addresses: tuple[int, ...]


NO_IDS = Ids((), (0, 0))


def _rows_and_ids(queue: Tensor, exclude: Exclude) -> tuple[Tensor, Ids]:
    """Returns the rows of the queue in use, and the ids."""
    ids, queue_ids, filled = (t if t is None else t.contiguous() for t in exclude)
    queue = queue if filled is None else queue[: int(filled)]
    return queue, Ids((ids, queue_ids), (_address(ids), _address(queue_ids)))


def _queue(queue: Tensor) -> tuple[int, int, int, int, bool]:
    return queue.data_ptr(), queue.stride(0), *queue.shape, queue.dtype == torch.bfloat16


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
