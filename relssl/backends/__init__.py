"""The backends, and the choice among them. base.py has the contract that each of them keeps."""

from collections.abc import Sequence, Sized
from functools import cache

import torch
from torch import Tensor

from relssl import tuned
from relssl.backends.base import Backend
from relssl.backends.chunked import Chunked
from relssl.backends.cpu import Cpu
from relssl.backends.cuda import Cuda
from relssl.backends.reference import Reference
from relssl.backends.sharded import Sharded, Sharding, is_sharded
from relssl.backends.triton import Triton

BACKENDS: dict[str, Backend] = {
    "cpu": Cpu(),
    "cuda": Cuda(),
    "triton": Triton(),
    "chunked": Chunked(),
    "reference": Reference(),
}
# As "auto" tries them where `relssl tune` has measured nothing. The others are opt-in: they run where they
# are named, or chosen by a measurement.
DEFAULTS = ("cpu", "triton", "chunked", "reference")


def get(name: str) -> Backend:
    """Returns the backend or variant, "NAME" or "NAME/VARIANT"."""
    own, _, variant = name.partition("/")
    if not variant:
        return BACKENDS[own]
    if is_sharded(name):
        sharding, inner = Sharding.split(name)
        return Sharded(sharding, get(inner))
    return _variant(BACKENDS[own], variant)


@cache  # by the backend, not its name: another may be registered under that
def _variant(backend: Backend, variant: str) -> Backend:
    return backend.variant(variant)


def refuse_sharded(name: str, what: str) -> None:
    """Raises RuntimeError if the queue is sharded: eager code would read this process's shard alone."""
    if is_sharded(name):
        raise RuntimeError(f"{what} cannot pass through a sharded queue")


def unsupported(name: str, device: str, dtype: torch.dtype, dim: int) -> str | None:
    """Returns the reason why the backend cannot run this, or None. Raises ValueError for an unknown name."""
    own, _, variant = str(name).partition("/")
    if own not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(('auto', *BACKENDS))}; got {name!r}")
    backend = BACKENDS[own]
    reason = backend.supports(device, dtype, dim)
    if reason or own == name:
        return reason
    if torch.compiler.is_compiling():  # The width may be symbolic, and what depends on it: the op raises.
        return None
    return backend.unsupported_variant(variant, dtype, dim)


def choose(
    name: str,
    device: str,
    dtype: torch.dtype,
    dim: int,
    stacks: Sequence[Tensor] = (),
    queue: Sized = (),
) -> str:
    """Returns the backend to run: `name`, or where that is "auto" the one that `relssl tune` found the
    fastest for a size near that of the stacks [..., D] of rows and the queue, or else the first default that
    can.

    Raises ValueError for an unknown name, or with the reason why the named backend cannot.
    """
    if name == "auto":
        if stacks and (choices := tuned.choices(device, dtype)):
            rows = sum(stack.numel() // dim for stack in stacks)
            if chosen := measured(choices, device, dtype, dim, rows, len(queue)):
                return chosen
        for name in DEFAULTS:  # the last of which takes anything
            if BACKENDS[name].supports(device, dtype, dim) is None:
                return name
    if is_sharded(name):
        sharding, inner = Sharding.split(name)
        return sharding.prefix() + choose(inner, device, dtype, dim, [*stacks] * sharding.group.size, queue)
    if reason := unsupported(name, device, dtype, dim):
        raise ValueError(f"backend {name!r} cannot run this: {reason}")
    return name


def measured(
    choices: Sequence[tuned.Choice], device: str, dtype: torch.dtype, dim: int, rows: int, queue: int
) -> str | None:
    """Returns the nearest of the choices, if it can run this."""
    chosen = tuned.nearest(choices, dim, rows, queue)
    if chosen and available(chosen.backend, device, dtype, chosen.dim):
        return chosen.backend
    return None


def available(name: str, device: str, dtype: torch.dtype, dim: int) -> bool:
    """Whether a backend exists and can run this."""
    return name.partition("/")[0] in BACKENDS and unsupported(name, device, dtype, dim) is None
