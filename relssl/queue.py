"""FeatureQueue: the ring of past embeddings that queries are compared with."""

from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl import enqueuing
from relssl.distributed import all_gather, world_size
from relssl.other_queues import translated

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the dtypes that losses take
Start = Literal["random", "zeros", "empty"]


class FeatureQueue(nn.Module):
    """A first-in, first-out queue of K feature rows of width D.

    It starts with random unit-norm rows, as ReSSL's and MoCo's code does. Pass it to the losses of
    `relssl.functional`; with its `rows` alone they exclude no rows. Enqueueing before `loss.backward()` is
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

    Where torch.distributed is initialised, `enqueue` gathers the keys of all ranks (no gradient), so
    every rank holds the same queue; each must enqueue equally many rows. The start is drawn from `seed`
    alone and is the same everywhere. So nothing needs broadcasting: keep the queue outside the module
    that DistributedDataParallel wraps, or wrap with `broadcast_buffers=False`; otherwise DDP sends all
    K·D values from rank 0 before every forward.

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

    Raises:
        TypeError: size, dim or seed is not an integer, dtype is none that the losses take, or ids is not a
            bool.
        ValueError: size or dim is below 1, or start is none of the above.
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
    ) -> None:
        super().__init__()
        if not all(isinstance(number, Integral) for number in (size, dim, seed)):
            raise TypeError(f"size, dim and seed must be integers, got {size!r}, {dim!r} and {seed!r}")
        if size < 1 or dim < 1:
            raise ValueError(f"size and dim must be at least 1, got {size} and {dim}")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
        if not isinstance(ids, bool):
            raise TypeError(f"ids must be True or False, got {type(ids).__name__}")
        if start not in get_args(Start):
            raise ValueError(f"start must be one of {', '.join(get_args(Start))}; got {start!r}")
        self.seed, self.start = seed, start
        with torch.inference_mode(False):  # See _make_writable.
            self.register_buffer("rows", torch.empty(size, dim, dtype=dtype, device=device))
            self.register_buffer("pointer", torch.empty((), dtype=torch.int64, device=device))
            self.register_buffer("count", torch.empty((), dtype=torch.int64, device=device))
            self.register_buffer("ids", torch.empty(size, dtype=torch.int64, device=device) if ids else None)
            self.reset()

    def __len__(self) -> int:
        return self.rows.shape[0]

    def extra_repr(self) -> str:
        size, dim = self.rows.shape
        ids = "" if self.ids is None else ", ids=True"
        return f"{size}, {dim}, dtype={self.rows.dtype}{ids}, start={self.start!r}"

    @property
    def filled(self) -> Tensor | None:
        """How many rows the losses use, of the first ones: `count` with start="empty", else None, for all."""
        return self.count if self.start == "empty" else None

    @torch.no_grad()
    def reset(self) -> None:
        """Restores the start: its rows, no ids, pointer and count 0. Random rows are drawn from the seed."""
        if self.rows.is_meta:
            return
        self._make_writable()
        if self.start == "random":
            # Not the bare seed: after torch.manual_seed(0), torch.randn would give the caller the same rows.
            generator = torch.Generator("cpu").manual_seed(0x5EED_0F_0EE + self.seed)
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

    def _apply(self, fn: Callable, recurse: bool = True) -> "FeatureQueue":
        # `to`, `to_empty` and the like all call this; meta buffers that become real hold garbage.
        was_meta = any(t.is_meta for t in self.buffers())
        super()._apply(fn, recurse)
        if was_meta:
            self.reset()
        return self

    def _make_writable(self) -> None:
        """Replace buffers made under inference mode, which nothing outside of it may write to.

        A queue gets such buffers when it is moved, copied or loaded under inference mode. A compiled enqueue
        cannot replace them: call `enqueue` or `reset` outside the graph first.
        """
        for name, t in self._buffers.items():
            if t is not None and t.is_inference():
                with torch.inference_mode(False):
                    self._buffers[name] = t.clone()

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
        state_dict = translated(state_dict, prefix, self._buffers, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Overwrites the oldest rows with `keys`, and their ids, of all ranks where there are several.

        Args:
            keys: [B, D], any B ≥ 1; of more than K rows the last K stay. Cast to the queue's dtype.
            ids: int64 [B], the keys' ids, negative where a key has none; for a queue with ids alone.

        Raises:
            TypeError: keys is not a dense floating-point tensor, or ids is not a dense int64 tensor.
            ValueError: keys is not [B, D] with the queue's D, or ids is not [B]; the queue keeps ids and
                none are given, or the reverse.
            RuntimeError: keys or ids are on another device, or share memory with the queue.
        """
        if not isinstance(keys, Tensor) or not keys.is_floating_point():
            got = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
            raise TypeError(f"keys must be a floating-point tensor, got {got}")
        if keys.layout != torch.strided:
            raise TypeError(f"keys must be a dense tensor, got {keys.layout}")
        if not torch.compiler.is_compiling():
            self._make_writable()
        rows, own_ids = self.rows, self.ids
        dim = rows.shape[1]
        if keys.dim() != 2 or keys.shape[1] != dim or keys.shape[0] == 0:
            raise ValueError(f"keys must be [B, {dim}] with B ≥ 1, got shape {tuple(keys.shape)}")
        if keys.device != rows.device:
            raise RuntimeError(f"keys is on {keys.device}, but the queue on {rows.device}")
        if ids is not None:
            _check_ids(ids, keys)
        if (ids is None) != (own_ids is None):
            raise ValueError(
                "ids must be given: the queue keeps them" if ids is None
                else "ids must be None: the queue keeps none (FeatureQueue's ids=True)"
            )  # fmt: skip
        if world_size() > 1:
            keys, ids = all_gather(keys.to(rows.dtype)), None if ids is None else all_gather(ids)
        enqueuing.enqueue(rows, own_ids, self.pointer, self.count, keys, ids)


def _check_ids(ids: Tensor, keys: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be an int64 tensor, got {got}")
    if ids.layout != torch.strided:
        raise TypeError(f"ids must be a dense tensor, got {ids.layout}")
    if ids.shape != keys.shape[:1]:
        raise ValueError(f"ids must be [B] = [{len(keys)}], got shape {tuple(ids.shape)}")
    if ids.device != keys.device:
        raise RuntimeError(f"ids is on {ids.device}, but keys on {keys.device}")
