"""FeatureQueue: the ring of past embeddings that queries are compared with."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl import enqueuing, shards
from relssl.backends.sharded import Sharding
from relssl.groups import Group, all_gather
from relssl.other_queues import translated

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the dtypes that losses take
Start = Literal["random", "zeros", "empty"]


class FeatureQueue(nn.Module):
    """A first-in, first-out queue of K feature rows of width D.

    It starts with random unit-norm rows, as ReSSL's and MoCo's code does. Pass it to the losses of
    `relssl.functional`; with its `rows` alone they exclude no rows, and compare with this process's shard
    alone where the queue is sharded. Enqueueing before `loss.backward()` is
    safe there: the gradient is computed in the forward pass, and no clone of the queue is needed.

    Rows, ids, pointer and count are persistent buffers that stay on the device. Enqueueing is one op: a C++
    call on a CPU, a launch of Triton on a GPU. It never synchronises, traces under torch.compile and replays
    in a CUDA graph.

    With ids the queue keeps an integer beside each row, such as the index or the class of its image. A loss
    that is given the ids of its rows excludes for each row the queue rows of the same id.

    `load_state_dict` also takes the buffers `queue` and `queue_ptr` of MoCo and of ReSSL's authors, [D, K],
    and of solo-learn's ReSSL, [K, D], under the names that this module's own would have there
    ("memory.queue" for a child "memory"). Where D = K it takes the rows for [D, K]. A queue loaded so is
    full, and its rows have no ids. A state dict has neither start nor seed: create a queue that is to be
    resumed with the same arguments.

    Where torch.distributed is initialised, `enqueue` gathers the keys of all processes (no gradient), so
    every process holds the same queue; each must enqueue equally many rows, unless `uneven`. The start is
    drawn from `seed` alone and is the same everywhere. So nothing needs broadcasting: keep the queue outside
    the module that DistributedDataParallel wraps, or wrap with `broadcast_buffers=False`; otherwise DDP
    sends all K·D values from rank 0 before every forward.

    With `sharded`, each of W processes keeps K/W rows, its own last keys, and `enqueue` communicates nothing.
    The losses compare the rows of each process with the union of the shards: they gather q and k, and return
    log-sum-exps and means (`relssl.backends.sharded`), so every process must call them alike, with equally
    many rows unless `uneven`. `rows`, `ids`, `pointer` and `count` are those of the shard and no buffers of
    the module: DistributedDataParallel, which would overwrite them with rank 0's, leaves them alone. Row i of
    the shard of rank r has the index r·ceil(K/W) + i. The state dict has DTensors, of which
    torch.distributed.checkpoint saves each shard from its own process; loaded by another number of
    processes, the rows are dealt by their ages. A learned shard's gradient is that of the sum of all
    processes' losses. Double backward and torch.func do not work with shards.

    Built on the meta device it has no rows; `to_empty(device=...)` gives it its start.

    Args:
        size: number of rows K.
        dim: width of a row D.
        dtype: dtype of the rows, by default torch's default dtype. bfloat16 halves the memory.
        device: device of the rows.
        seed: seed of the random start.
        ids: whether it keeps ids.
        start: "random" rows of norm 1, or "zeros"; "empty" has zeros, too, but the losses exclude rows that
            have not been written yet.
        group: the processes that share the queue, by default all.
        gather: whether `enqueue` gathers the keys of the group. Without, each process has a queue of its own.
            A sharded queue gathers none in any case.
        uneven: whether processes may enqueue different numbers of rows, also none, or with `sharded` compare
            different numbers, at least one each. They are exchanged in every call, which synchronises.
            Otherwise different numbers raise an error in every process; on a GPU, where the numbers are
            exchanged when they change, they may also end by the group's timeout.
        sharded: whether each process keeps a part of the rows. Create such a queue after
            torch.distributed is initialised.

    Raises:
        TypeError: size, dim or seed is not an integer, dtype is none that the losses take, ids, gather,
            uneven or sharded is not a bool, or group is no process group of this process.
        ValueError: size or dim is below 1, start is none of the above, or there are too few rows for the
            processes of a sharded queue.
    """

    rows: Tensor
    """The rows [K, D]."""
    pointer: Tensor
    """The index of the row that is overwritten next, int64, 0-d."""
    count: Tensor
    """The number of rows written so far, at most K, int64, 0-d. While `enqueue` runs on a GPU, a stream that
    does not wait for it can read another number."""
    ids: Tensor | None
    """The ids of the rows, int64 [K], negative where a row has none; None for a queue without ids."""

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        ids: bool = False,
        start: Start = "random",
        group: ProcessGroup | None = None,
        gather: bool = True,
        uneven: bool = False,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        if not all(isinstance(number, Integral) for number in (size, dim, seed)):
            raise TypeError(f"size, dim and seed must be integers, got {size!r}, {dim!r} and {seed!r}")
        if size < 1 or dim < 1:
            raise ValueError(f"size and dim must be at least 1, got {size} and {dim}")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
        for name, value in {"ids": ids, "gather": gather, "uneven": uneven, "sharded": sharded}.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
        if start not in get_args(Start):
            raise ValueError(f"start must be one of {', '.join(get_args(Start))}; got {start!r}")
        self.seed, self.start = seed, start
        self.group, self.gather, self.uneven, self.sharded = Group.of(group), gather, uneven, sharded
        self.size, self.num_shards = size, self.group.size if sharded else 1
        self._shard = self.group.rank if sharded else 0
        if sharded:
            sizes = shards.shard_sizes(size, self.num_shards)
            if not all(sizes):
                raise ValueError(f"a queue of {size} rows does not divide among {self.num_shards} processes")
            size = sizes[self._shard]
        with torch.inference_mode(False):  # See _make_writable.
            self._set("rows", torch.empty(size, dim, dtype=dtype, device=device))
            self._set("pointer", torch.empty((), dtype=torch.int64, device=device))
            self._set("count", torch.empty((), dtype=torch.int64, device=device))
            self._set("ids", torch.empty(size, dtype=torch.int64, device=device) if ids else None)
            self.reset()

    def _set(self, name: str, t: Tensor | None) -> None:
        """Sets one of the queue's tensors, which of a sharded queue are no buffers: see above."""
        if self.sharded:
            setattr(self, name, t)
        else:
            self.register_buffer(name, t)

    def _tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("rows", "pointer", "count", "ids")}
        return {name: t for name, t in found.items() if t is not None}

    def __len__(self) -> int:
        return self.size

    def extra_repr(self) -> str:
        ids = "" if self.ids is None else ", ids=True"
        parts = f", sharded=True, num_shards={self.num_shards}" if self.sharded else ""
        return f"{self.size}, {self.rows.shape[1]}, dtype={self.rows.dtype}{ids}, start={self.start!r}{parts}"

    @property
    def filled(self) -> Tensor | None:
        """How many rows the losses use, of the first ones: `count` with start="empty", else None, for all."""
        return self.count if self.start == "empty" else None

    @property
    def written(self) -> Tensor:
        """Whether each row, of a sharded queue those of the shard, is none of the start: bool [K]."""
        return torch.arange(len(self.rows), device=self.rows.device) < self.count

    def _backend(self, name: str) -> str:
        """Returns the backend of losses over this sharded queue, if `name` is what computes them."""
        self._check_shards()
        if self.num_shards == 1:
            return name
        return Sharding(self.size, self.uneven, self.group).prefix() + str(name)

    def _check_shards(self) -> None:
        if not torch.compiler.is_compiling() and self.num_shards != self.group.size:
            raise RuntimeError(
                f"the queue was divided among {self.num_shards} processes, but there are {self.group.size}:"
                " create it after torch.distributed is initialised"
            )

    @torch.no_grad()
    def reset(self) -> None:
        """Restores the start: its rows, no ids, pointer and count 0. Random rows are drawn from the seed."""
        if self.rows.is_meta:
            return
        self._make_writable()
        if self.start == "random":
            # Not the bare seed: after torch.manual_seed(0), torch.randn would give the caller the same rows.
            # Every shard has rows of its own: an odd multiple, since generators use the lower 32 bits alone.
            seed = 0x5EED_0F_0EE + self.seed + self._shard * 0x9E37_79B1
            generator = torch.Generator("cpu").manual_seed(seed)
            start = torch.randn(self.rows.shape, generator=generator, dtype=torch.float32, device="cpu")
            self.rows.copy_(F.normalize(start, dim=1, out=start))
        else:
            self.rows.zero_()
        if self.ids is not None:
            self.ids.fill_(-1)
        self.pointer.zero_()
        self.count.zero_()

    def reset_parameters(self) -> None:
        """Calls `reset`; FSDP and others call this name after `to_empty`."""
        self.reset()

    def _apply(self, fn: Callable, recurse: bool = True) -> FeatureQueue:
        # `to`, `to_empty` and the like all call this; meta tensors that become real hold garbage.
        was_meta = any(t.is_meta for t in self._tensors().values())
        super()._apply(fn, recurse)
        if self.sharded:
            for name, t in self._tensors().items():
                setattr(self, name, fn(t))
        if was_meta:
            self.reset()
        return self

    def _make_writable(self) -> None:
        """Replace tensors made under inference mode, which nothing outside of it may write to.

        A queue gets such tensors when it is moved, copied or loaded under inference mode. A compiled enqueue
        cannot replace them: call `enqueue` or `reset` outside the graph first.
        """
        tensors = self._tensors() if self.sharded else self._buffers
        for name, t in tensors.items():
            if t is not None and t.is_inference():
                with torch.inference_mode(False):
                    setattr(self, name, t.clone())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.sharded:
            self._check_shards()
            destination.update({prefix + name: t for name, t in shards.state(self).items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state_dict = translated(state_dict, prefix, self, error_msgs)
        if self.sharded:
            self._check_shards()
            state_dict = shards.load(self, state_dict, prefix, missing_keys, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Overwrites the oldest rows with `keys`, and their ids, of all processes where there are several.

        Args:
            keys: [B, D], any B ≥ 1, or with `uneven` B ≥ 0; of more than K rows the last K stay. Cast to the
                queue's dtype.
            ids: int64 [B], the keys' ids, negative where a key has none; for a queue with ids alone.

        Raises:
            TypeError: keys is not a dense floating-point tensor, or ids is not a dense int64 tensor; or they
                are DTensors.
            ValueError: keys is not [B, D] with the queue's D, or ids is not [B]; the queue keeps ids and
                none are given, or the reverse; the processes have different numbers of keys and the queue
                is not `uneven`.
            RuntimeError: keys or ids are on another device, or share memory with the queue.
        """
        if not isinstance(keys, Tensor) or not keys.is_floating_point():
            got = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
            raise TypeError(f"keys must be a floating-point tensor, got {got}")
        if type(keys) is not Tensor:
            refuse_dtensor("keys", keys)
        if keys.layout != torch.strided:
            raise TypeError(f"keys must be a dense tensor, got {keys.layout}")
        if not torch.compiler.is_compiling():
            self._make_writable()
        rows, own_ids = self.rows, self.ids
        dim = rows.shape[1]
        shape = keys.shape
        if len(shape) != 2 or shape[1] != dim or (shape[0] == 0 and not self.uneven):
            at_least = 0 if self.uneven else 1
            raise ValueError(f"keys must be [B, {dim}] with B ≥ {at_least}, got shape {tuple(shape)}")
        if keys.device != rows.device:
            raise RuntimeError(f"keys is on {keys.device}, but the queue on {rows.device}")
        if ids is not None:
            _check_ids(ids, keys)
        if (ids is None) != (own_ids is None):
            raise ValueError(
                "ids must be given: the queue keeps them" if ids is None
                else "ids must be None: the queue keeps none (FeatureQueue's ids=True)"
            )  # fmt: skip
        if self.sharded:
            self._check_shards()
        elif self.gather and self.group.size > 1:
            counts = [n for (n,) in self.group.counts("enqueue's keys", (shape[0],), keys, self.uneven)]
            keys = all_gather(keys.to(rows.dtype), self.group, counts)
            ids = None if ids is None else all_gather(ids, self.group, counts)
            shape = keys.shape
        if shape[0]:
            enqueuing.enqueue(rows, own_ids, self.pointer, self.count, keys, ids)


def refuse_dtensor(name: str, t: Tensor) -> None:
    """Raises TypeError for a DTensor, whose operations the kernels do not replace."""
    if type(t).__name__ == "DTensor":  # Its import takes half a second.
        raise TypeError(
            f"{name} is a DTensor: pass {name}.to_local(), the rows of this process; a queue that is divided"
            " among processes is a FeatureQueue(..., sharded=True)"
        )


def _check_ids(ids: Tensor, keys: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be an int64 tensor, got {got}")
    refuse_dtensor("ids", ids)
    if ids.layout != torch.strided:
        raise TypeError(f"ids must be a dense tensor, got {ids.layout}")
    if ids.shape != keys.shape[:1]:
        raise ValueError(f"ids must be [B] = [{len(keys)}], got shape {tuple(ids.shape)}")
    if ids.device != keys.device:
        raise RuntimeError(f"ids is on {ids.device}, but keys on {keys.device}")
