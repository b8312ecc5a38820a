"""FeatureQueue: the ring of past embeddings that queries are compared with."""

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.distributed import all_gather

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the dtypes that losses take


class FeatureQueue(nn.Module):
    """A first-in, first-out queue of K feature rows of width D.

    It starts with random unit-norm rows, as ReSSL's and MoCo's code does. Pass it, or its `rows`, to the
    losses of `relssl.functional`. Enqueueing before `loss.backward()` is safe there: the gradient is
    computed in the forward pass, and no clone of the queue is needed.

    Rows, pointer and count are persistent buffers, and pointer and count stay on the device: enqueueing
    never synchronises, traces under torch.compile and replays in a CUDA graph.

    Where torch.distributed is initialised, `enqueue` gathers the keys of all ranks (no gradient), so
    every rank holds the same queue; each must enqueue equally many rows. The start is drawn from `seed`
    alone and is the same everywhere. So nothing needs broadcasting: keep the queue outside the module
    that DistributedDataParallel wraps, or wrap with `broadcast_buffers=False`; otherwise DDP sends all
    K·D values from rank 0 before every forward.

    Built on the meta device it has no rows; `to_empty(device=...)` gives it the random start.

    Args:
        size: number of rows K.
        dim: width of a row D.
        dtype: dtype of the rows, by default torch's default dtype. bfloat16 halves the memory.
        device: device of the rows.
        seed: seed of the random start.

    Raises:
        TypeError: size or dim is not an integer, or dtype is none that the losses take.
        ValueError: size or dim is below 1.
    """

    rows: Tensor
    """The rows [K, D]."""
    pointer: Tensor
    """The index of the row that is overwritten next, int64, 0-d."""
    count: Tensor
    """The number of rows written so far, at most K, int64, 0-d."""

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not all(isinstance(number, Integral) for number in (size, dim)):
            raise TypeError(f"size and dim must be integers, got {size!r} and {dim!r}")
        if size < 1 or dim < 1:
            raise ValueError(f"size and dim must be at least 1, got {size} and {dim}")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
        self.seed = seed
        with torch.inference_mode(False):  # See _make_writable.
            self.register_buffer("rows", torch.empty(size, dim, dtype=dtype, device=device))
            self.register_buffer("pointer", torch.empty((), dtype=torch.int64, device=device))
            self.register_buffer("count", torch.empty((), dtype=torch.int64, device=device))
            self.reset()

    def __len__(self) -> int:
        return self.rows.shape[0]

    def extra_repr(self) -> str:
        size, dim = self.rows.shape
        return f"{size}, {dim}, dtype={self.rows.dtype}"

    @torch.no_grad()
    def reset(self) -> None:
        """Restores the random start: unit-norm rows drawn from the seed, pointer and count 0."""
        if self.rows.is_meta:
            return
        self._make_writable()
        # Not the bare seed: after torch.manual_seed(0), torch.randn would give the caller the same rows.
        generator = torch.Generator("cpu").manual_seed(0x5EED_0F_0EE + self.seed)
        start = torch.randn(self.rows.shape, generator=generator, dtype=torch.float32, device="cpu")
        self.rows.copy_(F.normalize(start, dim=1, out=start))
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

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrites the oldest rows with `keys`, of all ranks where there are several.

        Args:
            keys: [B, D], any B ≥ 1; of more than K rows the last K stay. Cast to the queue's dtype.

        Raises:
            TypeError: keys is not a dense floating-point tensor.
            ValueError: keys is not [B, D] with the queue's D.
            RuntimeError: keys is on another device.
        """
        if not isinstance(keys, Tensor) or not keys.is_floating_point():
            got = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
            raise TypeError(f"keys must be a floating-point tensor, got {got}")
        if keys.layout != torch.strided:
            raise TypeError(f"keys must be a dense tensor, got {keys.layout}")
        if not torch.compiler.is_compiling():
            self._make_writable()
        rows, pointer = self.rows, self.pointer
        size, dim = rows.shape
        if keys.dim() != 2 or keys.shape[1] != dim or len(keys) == 0:
            raise ValueError(f"keys must be [B, {dim}] with B ≥ 1, got shape {tuple(keys.shape)}")
        if keys.device != rows.device:
            raise RuntimeError(f"keys is on {keys.device}, but the queue on {rows.device}")
        keys = all_gather(keys.to(rows.dtype))
        total, keys = len(keys), keys[-size:]
        first = pointer + (total - len(keys))
        at = (first + torch.arange(len(keys), device=keys.device)) % size
        rows.index_copy_(0, at, keys)
        pointer.add_(total).remainder_(size)
        self.count.add_(total).clamp_(max=size)
