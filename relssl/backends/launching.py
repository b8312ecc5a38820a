"""How Triton kernels are launched: the chip of a device, the kernels, and launches worked out once.

A launch is remembered by the device and the layout of its tensors. Triton itself inspects every argument of
every launch to find what it has compiled, which takes longer than all that is left here; with small batches
that is as long as the GPU's work (tools/launch.py).
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # as tiles.py has them


NOTHING = None, None, None  # is excluded: the tensors of an Exclude


def exclude_flags(ids: Tensor | None, queue_ids: Tensor | None, filled: Tensor | None) -> dict[str, Any]:
    """Returns the constants of a kernel that decide what it excludes: see kernels/common.py."""
    return {"EXCLUDE": 0 if ids is None else 1 if queue_ids is None else 2, "FILLED": filled is not None}


@cache
def kernels() -> SimpleNamespace:
    """Returns the kernels and what belongs to them. The first call imports Triton."""
    from triton import __version__
    from triton.runtime._allocation import NullAllocator, _allocator

    from relssl.kernels import backward, batch_norm, combine, enqueue, forward, heuristics, specialised

    return SimpleNamespace(
        NullAllocator=NullAllocator,
        allocator=_allocator,
        backward_queue=backward.backward_queue,
        backward_x=backward.backward_x,
        batch_norm=batch_norm,
        combine_info_nce=combine.combine_info_nce,
        combine_lse_and_mean=combine.combine_lse_and_mean,
        combine_relation=combine.combine_relation,
        enqueue=enqueue.enqueue,
        enqueue_blocks=enqueue.blocks,
        forward=forward.forward,
        heuristics=heuristics,
        lse_to_log2=backward.lse_to_log2,
        specialised=specialised.specialised,
        specialises=specialised.specialises,
        version=__version__,
    )


@cache
def chip(index: int) -> Any:
    """Returns the heuristics.Chip of a CUDA device, or for -1 the interpreter's."""
    heuristics = kernels().heuristics
    if index < 0:
        return heuristics.Chip(heuristics.INTERPRETER, 4)  # four, so that there are splits
    found = torch.cuda.get_device_properties(index)
    capability = heuristics.AMD if torch.version.hip else 10 * found.major + found.minor
    version = heuristics.version(kernels().version)
    return heuristics.Chip(capability, found.multi_processor_count, version)


def current_chip() -> Any:
    return chip(-1 if INTERPRETED else torch.cuda.current_device())


def device_guard(x: Tensor) -> AbstractContextManager:
    """Returns a context in which the device of x is the current one, where launches go."""
    if x.device.type == "cpu" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def precision(chip: Any, dtype: torch.dtype) -> str:
    """Returns the precision of float32 products beside rows of a dtype: for float32 rows as torch is set.

    Beside float16 rows the products of gradients are of float32, and lose nothing in TF32.
    """
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return kernels().heuristics.precision(chip.capability, exact=exact)


class Launch:
    """Launches of a kernel whose arguments differ in values only."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], **options: int) -> None:
        self.kernel, self.grid, self.options = kernel, (*grid, 1, 1)[:3], options
        self.constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self.values = tuple(self.constants.values())
        self.run: Any = None

    def __call__(self, *arguments: Any) -> None:
        if self.run is not None:
            self.run(*arguments, *self.values)
            return
        compiled = self.kernel[self.grid](*arguments, **self.constants, **self.options)
        if compiled is not None:  # It is None when interpreted.
            self.run = compiled[self.grid]


_cache: dict[tuple, Any] = {}


def cached_launch(work_out: Callable, device: int, *arguments: Any) -> Any:
    """Returns work_out(device, *arguments), remembered for tensors of one layout and else equal arguments.

    What it returns may hold functions that were loaded on one device, the one that all its tensors are on.
    """
    key = (work_out, device, *(_layout_key(a) if isinstance(a, Tensor) else a for a in arguments))
    found = _cache.get(key)
    if found is None:
        found = _cache[key] = work_out(device, *arguments)
    return found


def _layout_key(t: Tensor) -> tuple:
    """Returns all of a tensor that Triton compiles apart, and that tiles are chosen by."""
    return t.dtype, t.shape, t.stride(), t.data_ptr() % 16


def with_resident(chip: Any, kernel: Any, tiles: Any, constants: dict[str, Any], *arguments: Any) -> Any:
    """Returns the chip with as many processors as programs of a compiled kernel run on it at once."""
    heuristics = kernels().heuristics
    if chip.capability == heuristics.INTERPRETER:
        return chip
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    compiled = kernel.warmup(
        *arguments, **constants, grid=(1, 1, 1), num_warps=tiles.warps, num_stages=tiles.stages
    )
    _ = compiled.run  # loads it, which counts its registers
    made = compiled.metadata
    count = heuristics.resident(
        chip, made.num_warps, compiled.n_regs, made.shared, getattr(made, "tmem_size", None) or 0
    )
    return chip._replace(processors=chip.processors * count)


def set_allocator() -> None:
    """Gives Triton memory for the descriptors that a launch makes, where the caller has set no allocator."""
    if isinstance(kernels().allocator.get(), kernels().NullAllocator):
        kernels().allocator.set(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Returns memory on the current device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
