"""Collectives of the processes that torchrun starts; DistributedDataParallel averages their gradients.

With a single process, every function here is the identity.
"""

import atexit
import gc
import inspect
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

# How long a process waits for the others in a collective. They wait for rank 0 while it downloads data or
# evaluates, which may take an hour. torchrun ends them at once if a process ends; only for one that hangs
# do they wait so long, and then they end with an error. torch's own limit is 30 minutes, with NCCL 10.
TIMEOUT = timedelta(hours=3)

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
    """Initialises the process group under torchrun, and destroys it at the end; otherwise does nothing.

    After an exception the group remains: destroying it waits for the collectives that have begun, in which
    others may wait for this process. `end_of_process` does not wait for them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        store = _store_of_this_start(rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)
    _last_group[:] = [dist.group.WORLD]
    yield
    dist.destroy_process_group()


# A random id of this call of torchrun, which its restarts share, and whether this is a restart; in rank 0.
_launch: tuple[str | None, bool] = None, False


def launch() -> tuple[str | None, bool]:
    """Returns a random id of the call of torchrun, and whether its processes have been restarted.

    The id is None without torchrun, and in all processes but rank 0. torchrun's own id of a run may be that
    of an earlier call.
    """
    return _launch


def _store_of_this_start(rank: int, world_size: int) -> dist.Store:
    """Returns a part of torchrun's store without keys of processes that have ended.

    The store survives restarts, and torch 2.13 takes addresses from it that are of the start before. Rank 0
    names each start anew. The others may read the name before; a name is that of their own start once rank 0
    confirms their answer to it. (TORCHELASTIC_RESTART_COUNT would not do: machines may count differently.)
    """
    global _launch
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=TIMEOUT
    )
    own = uuid.uuid4().hex
    if rank == 0:
        if _launch[0] is None:  # This process may have had a group before.
            first = store.compare_set("relssl/launch", "", own).decode()
            _launch = first, first != own
        name, answers = own, [f"relssl/{own}/{other}" for other in range(1, world_size)]
        store.set("relssl/start", name)
        store.set(f"relssl/{name}/confirmed", " ".join(store.get(answer).decode() for answer in answers))
    else:
        while True:
            name = store.get("relssl/start").decode()
            store.set(f"relssl/{name}/{rank}", own)
            confirmed = f"relssl/{name}/confirmed"
            if store.check([confirmed]) and own in store.get(confirmed).decode():
                break
            time.sleep(0.02)
    return dist.PrefixStore(f"relssl/{name}", store)


@contextmanager
def end_of_process() -> Iterator[None]:
    """Under torchrun, ends a process at once that an exception would end, with its rank before the message.

    The interpreter's shutdown may wait for other processes. A collective fails where those have ended; then a
    line replaces the traceback.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        status = 1
        if not isinstance(error, SystemExit):
            message = traceback.format_exc()
            if isinstance(error, dist.DistError) or "gloo/transport/" in str(error):
                reason = " ".join(str(error).split())
                message = f"a collective failed, perhaps since another process has ended: {reason}"
        elif isinstance(error.code, str):
            message = error.code
        else:
            status, message = error.code or 0, ""
        if message:  # The first line feed ends the line of rank 0's progress bar.
            print(f"\nrank {os.environ['RANK']}: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def local_part(t: Tensor) -> Tensor:
    """Returns the part of a DTensor that this process holds; any other tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


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


def barrier() -> None:
    """Waits until all processes have come here."""
    if _is_distributed():
        dist.barrier()


def main_process_first(run: Callable[[], T]) -> T:
    """Returns run() of each process; the other processes wait until rank 0 has finished."""
    if rank() == 0:
        result = run()
    barrier()
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
