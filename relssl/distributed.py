"""What several processes share: torchrun starts them, DistributedDataParallel averages their gradients.

Everything here is the identity where there is one process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world() -> int:
    return dist.get_world_size() if _several() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


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
    everyone = rows.new_empty(world() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(everyone, rows.contiguous())
    return everyone


@torch.no_grad()
def shared(value: Tensor) -> Tensor:
    """The first process's value, in all of them."""
    if _several():
        dist.broadcast(value, 0)
    return value


def gather_with_grad(*rows: Tensor) -> tuple[Tensor, ...]:
    """`gather` of each, whose backward adds up what all processes send back to a row.

    For a loss of the whole batch that every process computes: each row gets `world` times its gradient, which the
    mean that DistributedDataParallel takes turns into the gradient that one process would have found.
    """
    if not _several():
        return rows
    from torch.distributed.nn.functional import all_gather

    return tuple(torch.cat(all_gather(r)) for r in rows)


@torch.no_grad()
def mean(value: Tensor) -> Tensor:
    """The mean over all processes."""
    if _several():
        value = value.clone()
        dist.all_reduce(value)
        value /= world()
    return value


def anyone(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process."""
    return bool(mean(torch.tensor(float(flag), device=device)) > 0)


def collect(value: Any) -> list[Any]:
    """The values, of any type that pickles, of all processes in rank order."""
    values = [value] * world()
    if _several():
        dist.all_gather_object(values, value)
    return values
