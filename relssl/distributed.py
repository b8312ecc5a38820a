"""Collectives of the processes that torchrun starts; DistributedDataParallel averages their gradients.

With a single process, every function here is the identity.
"""

import atexit
import gc
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

# Python must release a group last. DistributedDataParallel's C++ releases it holding the GIL and joins Gloo's
# threads, of which one may wait for the GIL to free a tensor; Python's own reference gives the GIL up first.
# It must do so before the interpreter shuts down: that ends a thread which asks for the GIL, through frames
# of C++ that abort the process.
_last_group: list[dist.ProcessGroup | None] = []


@atexit.register
def _release_last_group() -> None:
    gc.collect()  # DistributedDataParallel, which may be part of a cycle
    _last_group.clear()


def rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if _is_distributed() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main_process() -> bool:
    """Returns whether this is rank 0, even after the group is destroyed."""
    return int(os.environ.get("RANK", 0)) == 0


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Initialises the process group under torchrun, and destroys it at the end; otherwise does nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    _last_group[:] = [dist.group.WORLD]
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_gather_object(value: T) -> list[T]:
    """Returns the values of all processes, of any type that can be pickled, by rank."""
    values = [value] * world_size()
    if _is_distributed():
        dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def all_reduce_mean(value: Tensor) -> Tensor:
    """Returns the mean over all processes."""
    if _is_distributed():
        value = value.clone()
        dist.all_reduce(value)
        value /= world_size()
    return value


@torch.no_grad()
def all_reduce_max(values: list[float], device: torch.device) -> list[float]:
    """Returns the maximum of each value over all processes."""
    if not _is_distributed():
        return values
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def any_rank(condition: bool, device: torch.device) -> bool:
    """Returns whether the condition holds in any process."""
    return bool(all_reduce_max([float(condition)], device)[0])


@torch.no_grad()
def broadcast(value: Tensor) -> Tensor:
    """Sets `value` to rank 0's, in place, and returns it."""
    if _is_distributed():
        dist.broadcast(value, 0)
    return value


def main_process_first(run: Callable[[], T]) -> T:
    """Returns run() of each process; the other processes wait until rank 0 has finished."""
    if rank() == 0:
        result = run()
    if _is_distributed():
        dist.barrier()
    return result if rank() == 0 else run()


def wrap_ddp(module: nn.Module, find_unused_parameters: bool) -> nn.Module:
    """Wraps a module so that its gradients are averaged over the processes; returns it if there is only one.

    Buffers are not broadcast before every step: a queue is the same in all processes, and each process has
    its own BatchNorm statistics.

    find_unused_parameters: whether a step may leave parameters without a gradient.
    """
    if not _is_distributed():
        return module
    ddp: Callable[..., nn.Module] = nn.parallel.DistributedDataParallel
    new = "forward_sync_buffers" in inspect.signature(ddp).parameters  # torch >= 2.13
    buffers = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return ddp(module, find_unused_parameters=find_unused_parameters, **buffers)


def average_gradients(module: nn.Module, when: bool) -> AbstractContextManager:
    """Returns a context in which the backward passes of what `wrap_ddp` wrapped average gradients, or do not.

    Gradients that were added to before without an average are part of the next one.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel) and not when:
        return module.no_sync()
    return nullcontext()
