"""How forward saves tensors for backward, and the guard of a queue that may change in between.

Gradients are computed in forward, so the queue may change before backward: a plain reference to it is kept,
and a backward that must read the queue again raises if it has changed.

torch.compile moves operations that only backward uses behind the rest of the graph, such as an enqueue, and
checks no versions. There what backward reads of the inputs are snapshots, which the loss reads too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relssl import ops
from relssl._compat import in_functorch_transform, saving_is_hooked, version
from relssl.validation import savable


class _QueueGuard:
    """A plain reference to a queue and its exclusions, which raises when read after one has changed.

    Saved by autograd, the queue could not change before backward even where backward never reads it.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = tensors
        self.versions = [*map(version, tensors)]

    def get(self) -> tuple[Tensor | None, ...]:
        if any(t is not None and t.is_inference() for t in self.tensors):
            raise RuntimeError(
                "this backward must read the queue again (double backward), but the queue was made under"
                " torch.inference_mode(), where changes are not counted: pass a clone"
            )
        if [*map(version, self.tensors)] != self.versions:
            raise RuntimeError(
                "this backward must read the queue again (double backward, or the gradient of a mean),"
                " but the queue has changed since the forward pass: enqueue after backward, or pass a clone"
            )
        return self.tensors


def _version_tensor(queue: Tensor, exclude: Sequence[Tensor | None]) -> Tensor:
    """Returns a small tensor whose shape encodes the number of writes to all modulo 1,024, for autograd to
    save.

    Activation checkpointing runs forward again for backward and raises where the two runs save other shapes:
    so it raises where the queue has moved in between, and the gradient would be another queue's.
    """
    count = sum(version(t) or 0 for t in (queue, *exclude))
    return queue.new_zeros((1 + count % 32, 1 + count // 32 % 32))


def save(
    ctx: Any,
    queue: Tensor,
    exclude: tuple[Tensor | None, ...],
    keep: bool,
    inputs: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
) -> None:
    """Saves inputs and results for backward, then queue and exclusions if `keep`; else it refers to these.

    Where hooks process what autograd saves, the versions of queue and exclusions are saved behind all.
    """
    again = (queue, *exclude) if keep else ()
    if torch.compiler.is_compiling():  # A compiled graph cannot hold a plain reference.
        ctx.queue_guard = None
    else:
        ctx.queue_guard = None if keep else _QueueGuard(queue, *exclude)
        for t in inputs + again:
            if t is not None and t.is_inference():
                inputs, again = tuple(map(savable, inputs)), tuple(map(savable, again))
                break
        if saving_is_hooked():
            again = *again, _version_tensor(queue, exclude)
    ctx.save_for_backward(*inputs, *results, *again)


def read_again(ctx: Any, rest: Sequence[Tensor | None], count: int) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Returns queue and exclusions, `count` tensors, as forward had them.

    rest: the end of ctx.saved_tensors, which has them where forward has saved them.
    """
    queue, *exclude = rest[:count] if ctx.queue_guard is None else ctx.queue_guard.get()
    return queue, exclude  # type: ignore[return-value]


def snapshots(*inputs: tuple[Any, bool]) -> list[Any]:
    """Returns the inputs of a compiled graph, with snapshots of the tensors that backward will read."""
    return [ops.snapshot(t) if read and isinstance(t, Tensor) else t for t, read in inputs]


def distinct(*inputs: Any) -> Sequence[Any]:
    """Returns the inputs of an autograd.Function as torch.compile takes them: a view where a tensor recurs.

    Dynamo merges a tensor in two places into one: torch 2.11 then returns wrong gradients, and 2.13 refuses.
    """
    if not torch.compiler.is_compiling():
        return inputs
    twice = [isinstance(t, Tensor) and any(t is u for u in inputs[:i]) for i, t in enumerate(inputs)]
    return [t.view_as(t) if again else t for t, again in zip(inputs, twice, strict=True)]


class _WithVersion(torch.autograd.Function):
    """Returns a copy of a tensor, and saves the versions of a queue and its exclusions with it."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, queue: Tensor, *exclude: Tensor | None) -> Tensor:
        save(ctx, queue, exclude, False, (), ())
        return result.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # which is where checkpointing compares
        return g, *(None,) * (len(ctx.needs_input_grad) - 1)


def with_version(result: Tensor, queue: Tensor, exclude: Sequence[Tensor | None]) -> Tensor:
    """Has the backward of a result of the reference compare their versions, as `save` does."""
    if (
        not result.requires_grad
        or torch.compiler.is_compiling()
        or in_functorch_transform()
        or not saving_is_hooked()
    ):
        return result
    return _WithVersion.apply(result, queue, *exclude)


def unaliased(queue: Tensor) -> Tensor:
    """Returns the queue as eager code may save it for backward: enqueueing must not change it."""
    return queue if queue.requires_grad else queue.clone()
