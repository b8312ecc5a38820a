"""CUDA C++ (csrc/cuda): loss and gradient in two launches, on NVIDIA GPUs from Ampere on, for 16-bit rows.

Here tensors become addresses: dtypes and shapes have been checked, and rows that are not contiguous or do not
begin at multiples of 16 bytes are copied once. "cuda" runs the kernel for sm_80 on every GPU, "cuda/sm_90a"
the one for Hopper. No GPU has verified them yet. Gradients that read the queue again come from Triton, or
from the tiles of PyTorch where Triton is missing.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relssl._compat import constant_result
from relssl.backends.base import Backend
from relssl.backends.chunked import Chunked
from relssl.backends.common import Cotangents, Exclude, Saved, Scale
from relssl.backends.common import total as weighted_sum
from relssl.backends.launching import NOTHING
from relssl.backends.split_combine import SplitCombine
from relssl.backends.triton import Triton

missing = ""  # why there is no _cuda
try:
    from relssl import _cuda  # type: ignore[attr-defined]
except ImportError as error:
    _cuda = None
    try:
        from relssl import _build_info

        missing = f"relssl._cuda is not built: {_build_info.CUDA}"
    except ImportError:
        missing = f"relssl._cuda is not built: {error}"

WIDTHS = (64, 128, 256, 512)
DRIVERS = {12: "525 or later", 13: "580 or later"}  # for each CUDA (CUDA Compatibility, minor versions)
RESERVED = 1024  # bytes of shared memory that each block has beside its own
Number = tuple[float, int]  # a scale: its value, or its address
Partials = tuple[Tensor, Tensor]  # stats, means


class Kernel(NamedTuple):
    tiles: Any  # heuristics.Tiles
    blocks: int  # to a multiprocessor
    shared: int  # bytes


HOPPER = "sm_90a"

TRITON, CHUNKED = Triton(), Chunked()


class Cuda(SplitCombine[Partials, Number]):
    """CUDA C++ (csrc/cuda): the whole loss in two launches, for 16-bit rows on NVIDIA GPUs from Ampere on."""

    def __init__(self, capability: int = 80) -> None:
        """The compute capability, times 10, of the kernel to run: 80 or 90."""
        self._capability = capability

    def supports(self, device: str, dtype: torch.dtype, dim: int) -> str | None:
        if device != "cuda" or torch.version.hip:
            return f"it runs on NVIDIA GPUs, not on {'ROCm' if device == 'cuda' else device}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        if dim not in WIDTHS:
            return f"it takes rows of {', '.join(map(str, WIDTHS))}, not of {dim}"
        if not _cuda:
            return missing
        return next(reason for width, reason in _unsupported_widths() if width == dim)

    def variants(self, dtype: torch.dtype, dim: int) -> list[str]:
        return [] if self.unsupported_variant(HOPPER, dtype, dim) else [HOPPER]

    def unsupported_variant(self, variant: str, dtype: torch.dtype, dim: int) -> str | None:
        index = torch.cuda.current_device()
        if variant != HOPPER:
            return f"its only variant is {HOPPER}, not {variant!r}"
        if _chip(index).capability != 90:
            return f"{HOPPER} needs compute capability 9.0, not {_chip(index).capability / 10}"
        if HOPPER not in _cuda.architectures:
            return f"it was built for {_cuda.architectures} only"
        return None

    def variant(self, name: str) -> "Cuda":
        if name != HOPPER:
            raise ValueError(f"the variants of cuda are {HOPPER} alone, not {name!r}")
        return Cuda(capability=90)

    def kernel_layout(self, t: Tensor) -> Tensor:
        if t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0:
            return t
        return t.clone(memory_format=torch.contiguous_format)

    def device_guard(self, x: Tensor) -> AbstractContextManager:
        return nullcontext()

    def kernel_scales(self, scale: Scale) -> tuple[Number, ...]:
        """Numbers in units of log 2, or addresses of what lies on the device."""
        if isinstance(scale, Tensor):
            return tuple((0.0, scale.data_ptr() + 4 * i) for i in range(len(scale)))
        return tuple((_heuristics().log2_scale(c), 0) for c in scale)

    def forward(
        self, first: Tensor, second: Tensor, queue: Tensor, scales: tuple[Number, Number],
        exclude: Exclude | None, want_mean: bool,
    ) -> Partials:  # fmt: skip
        (size, dim), rows = queue.shape, first.shape[0] + second.shape[0]
        place = _place(queue)
        chip = _chip(place[0])
        capability = _runnable(self._capability, queue)
        kernel = _kernel(dim, capability)
        fitting = (_shared(place[0]) + RESERVED) // (kernel.shared + RESERVED)
        slots = chip._replace(processors=chip.processors * min(kernel.blocks, fitting))
        number, step = _heuristics().split_queue(rows, size, dim, kernel.tiles, slots)
        stats = queue.new_empty((3, number, rows), dtype=torch.float32)
        means = queue.new_empty((number, rows, dim) if want_mean else 0, dtype=torch.float32)
        _cuda.forward(
            place, capability, _rows(first), scales[0], _rows(second), scales[1], _rows(queue), dim,
            _is_bf16(queue), *(0 if t is None else t.data_ptr() for t in exclude or NOTHING), number, step,
            stats.data_ptr(), _wanted(means),
        )  # fmt: skip
        return stats, means

    def combine_lse_and_mean(
        self, partials: Partials, scales: tuple[Number, Number], num_first: int, lse: Tensor, mean: Tensor
    ) -> None:
        dim = mean.shape[1] or WIDTHS[0]  # of nothing
        _cuda.combine_lse_and_mean(
            _place(lse), _partials(partials), *scales, num_first, dim, lse.data_ptr(), _wanted(mean)
        )

    def combine_relation(
        self, q: Tensor, k: Tensor, scales: tuple[Number, Number], teacher: Partials, student: Partials,
        offset: int, form: str, weight: float, may_be_empty: bool, losses: Tensor, loss: Tensor | None,
        entropy: Tensor, grad_q: Tensor, lse: Tensor, mean_t: Tensor,
    ) -> None:  # fmt: skip
        _cuda.combine_relation(
            _place(q), _partials(teacher), _partials(student, offset), _rows(q), _rows(k), *scales,
            q.shape[1], _is_bf16(q), form == "kl", may_be_empty, weight,
            losses.data_ptr(), entropy.data_ptr(), _wanted(grad_q), lse.data_ptr(), mean_t.data_ptr(),
        )  # fmt: skip
        if loss is not None:
            weighted_sum(losses, weight, loss)

    def combine_info_nce(
        self, q: Tensor, k: Tensor, scale: Number, partials: Partials, weight: float,
        losses: Tensor, loss: Tensor | None, sigma: Tensor, grad_q: Tensor, lse: Tensor,
    ) -> None:  # fmt: skip
        _cuda.combine_info_nce(
            _place(q), _partials(partials), _rows(q), _rows(k), scale, q.shape[1], _is_bf16(q), weight,
            losses.data_ptr(), sigma.data_ptr(), _wanted(grad_q), lse.data_ptr(),
        )  # fmt: skip
        if loss is not None:
            weighted_sum(losses, weight, loss)

    def vjp(
        self, saved: Saved, cotangents: Cotangents, want_x: bool, want_queue: bool
    ) -> tuple[Tensor, Tensor]:
        return _borrowed(saved.x).vjp(saved, cotangents, want_x, want_queue)

    def nt_xent_vjp(self, z: Tensor, scale: Scale, lse: Tensor, g: Tensor) -> Tensor:
        return _borrowed(z).nt_xent_vjp(z, scale, lse, g)


def _borrowed(x: Tensor) -> Backend:
    """Returns the backend of the gradients that read the rows or the queue again."""
    return CHUNKED if TRITON.supports(x.device.type, x.dtype, x.shape[1]) else TRITON


@constant_result
def _unsupported_widths() -> list[tuple[int, str | None]]:
    """For each width the reason why the current device cannot take it, or None."""
    index = torch.cuda.current_device()
    chip = _chip(index)
    if chip.capability < 80:
        return [(dim, f"it needs compute capability 8.0, not {chip.capability / 10}") for dim in WIDTHS]
    if _missing(index):
        return [(dim, _missing(index)) for dim in WIDTHS]
    needed, there = {dim: _kernel(dim, 80).shared for dim in WIDTHS}, _shared(index)
    return [
        (dim, f"rows of {dim} need {n} bytes of shared memory, this GPU has {there}" if n > there else None)
        for dim, n in needed.items()
    ]


@cache
def _heuristics() -> ModuleType:
    from relssl.kernels import heuristics  # which only an installed package has

    return heuristics


@cache
def _chip(index: int) -> Any:
    found = torch.cuda.get_device_properties(index)
    return _heuristics().Chip(10 * found.major + found.minor, found.multi_processor_count)


def built_with() -> str:
    major, minor = divmod(_cuda.toolkit, 1000)
    return f"CUDA {major}.{minor // 10}, which needs a driver {DRIVERS.get(major, f'for CUDA {major}')}"


@cache
def _missing(index: int) -> str | None:
    reason = _cuda.missing(index)
    major, minor = divmod(_cuda.driver(), 1000)
    if reason and 0 < major < _cuda.toolkit // 1000:
        reason += f": it was built with {built_with()}, and the driver here is for CUDA {major}.{minor // 10}"
    return reason or None


@cache
def _shared(index: int) -> int:
    return _cuda.shared_memory(index)


def _runnable(capability: int, queue: Tensor) -> int:
    """Returns the capability, or 80 for rows that overlap, which TMA does not take."""
    apart = queue.stride(0) >= queue.shape[1] or queue.shape[0] == 1
    return capability if apart else 80


@cache
def _kernel(dim: int, capability: int) -> Kernel:
    m, n, warps, stages, blocks, shared = _cuda.tiles(dim, capability)
    return Kernel(_heuristics().Tiles(m, n, warps, stages), blocks, shared)


def _place(x: Tensor) -> tuple[int, int]:
    """Returns device and stream, which every launch takes."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _rows(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), t.stride(0), t.shape[0]


def _partials(partials: Partials, offset: int = 0) -> tuple[int, int, int, int, int]:
    stats, means = partials
    _, num_splits, rows = stats.shape
    return stats.data_ptr(), _wanted(means), rows, offset, num_splits


def _is_bf16(t: Tensor) -> bool:
    return t.dtype == torch.bfloat16


def _wanted(t: Tensor) -> int:
    """Returns the address of t, or 0 where t is empty, which means not wanted."""
    return t.data_ptr() if t.numel() else 0
