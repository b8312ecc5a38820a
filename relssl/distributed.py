"""What several processes share: torchrun starts them, DistributedDataParallel averages their gradients.

Everything here is the identity where there is one process.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world() -> int:
    return dist.get_world_size() if _several() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def first() -> bool:
    """Whether this is the process that speaks for all; also when they have parted."""
    return int(os.environ.get("RANK", 0)) == 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Within, the processes that torchrun started can talk; without torchrun, nothing happens."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def gather(rows: Tensor) -> Tensor:
    """The rows [B, ...] of all processes in rank order, [world · B, ...], without a gradient."""
    if not _several():
        return rows
    everyone = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(everyone, rows.contiguous())
    return torch.cat(everyone)


def parallel(module: nn.Module, unused: bool) -> nn.Module:
    """The module whose gradients are the mean of all processes'; itself where there is one.

    Buffers are not sent before every step: a queue is the same everywhere, and BatchNorm's statistics are
    each process's own.

    unused: whether a step may leave parameters without a gradient.
    """
    if not _several():
        return module
    parallel: Any = nn.parallel.DistributedDataParallel
    new = "forward_sync_buffers" in inspect.signature(parallel).parameters  # torch >= 2.13
    buffers = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return parallel(module, find_unused_parameters=unused, **buffers)


@torch.no_grad()
def shared(value: Tensor) -> Tensor:
    """The first process's value, in all of them."""
    if _several():
        dist.broadcast(value, 0)
    return value


def gather_with_grad(*rows: Tensor) -> tuple[Tensor, ...]:
    """`gather` of each, whose backward adds up what all processes send back to a row.

    For a loss of the whole batch that every process computes: each row gets `world` times its gradient, and
    the mean that DistributedDataParallel takes makes of it the gradient that one process would have found.
    """
    return tuple(map(_Gather.apply, rows)) if _several() else rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return gather(rows)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        g = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(g)
        return g.chunk(world())[rank()]


@torch.no_grad()
def mean(value: Tensor) -> Tensor:
    """The mean over all processes."""
    if _several():
        value = value.clone()
        dist.all_reduce(value)
        value /= world()
    return value


def first_ahead(run: Callable[[], T]) -> T:
    """What run() returns in each process; the first one's is over before the others begin."""
    if rank() == 0:
        result = run()
    if _several():
        dist.barrier()
    return result if rank() == 0 else run()


@torch.no_grad()
def maximum(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value over all processes."""
    if not _several():
        return values
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def collect(value: Any) -> list[Any]:
    """The values, of any type that pickles, of all processes in rank order."""
    values = [value] * world()
    if _several():
        dist.all_gather_object(values, value)
    return values
