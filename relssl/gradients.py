"""The gradients of a training step, of a whole batch or of its parts one after another.

A loss that is a mean over images has the mean of its parts' gradients. For a loss that compares the images of
a batch with each other, the gradient with respect to the outputs of all parts is computed first; then the
encoder runs again, part by part, on the very same views (GradCache: Gao et al., RepL4NLP 2021, section 3.2).
Both equal the gradients of the whole batch, except that BatchNorm normalises each part by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relssl import distributed, random_state
from relssl.datasets.images import Views
from relssl.methods.base import Method

Logs = dict[str, Tensor]


class Encoder(nn.Module):
    """`Method.encode` as the forward of a module, which DistributedDataParallel can wrap."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, views: Sequence[Tensor], pass_name: str) -> tuple[Tensor, ...]:
        return self.method.encode(views, pass_name)


class Gradients:
    """Computes the gradients of a method's steps.

    Args:
        encoder: an `Encoder` of the method, wrapped or not.
        parts: number of parts of equal size that a batch is divided into.
        autocast: opens the context of each forward pass.
        scale: multiplies a loss before its backward pass, as GradScaler.scale does.
    """

    def __init__(
        self,
        method: Method,
        encoder: nn.Module,
        parts: int = 1,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> None:
        self.method, self.encoder, self.parts = method, encoder, parts
        self.autocast, self.scale = autocast, scale

    def add(self, images: Views, pass_name: str, ids: Tensor | None = None) -> tuple[Tensor, Logs]:
        """Adds the gradients of a step to those of the parameters, and moves teacher and queue once.

        For the arguments see `Method.forward`. Returns the loss, and scalars to log, without gradients.
        """
        self.method.update_teacher()
        add = self._add_compared if self.method.compares_images and self.parts > 1 else self._add_independent
        loss, logs, outputs = add(_divide(images, self.parts), pass_name, ids)
        self.method.update_queue(outputs, ids)
        return loss.detach(), {name: value.detach() for name, value in logs.items()}

    def _add_independent(
        self, parts: Sequence[Views], pass_name: str, ids: Tensor | None
    ) -> tuple[Tensor, Logs, list[Tensor]]:
        all_ids = [None] * len(parts) if ids is None else ids.chunk(len(parts))
        losses, logs, outputs = [], [], []
        for number, (images, part_ids) in enumerate(zip(parts, all_ids, strict=True), 1):
            with distributed.average_gradients(self.encoder, number == len(parts)):
                with self.autocast():
                    found = self.encoder(self.method.augment(images), pass_name)
                    loss, scalars = self.method.loss(found, pass_name, part_ids)
                self.scale(loss / len(parts)).backward()
            losses.append(loss.detach())
            logs.append(scalars)
            outputs.append([rows.detach() for rows in found])
        return (
            _mean(losses),
            {name: _mean([s[name] for s in logs]) for name in logs[0]},
            _concatenate(outputs),
        )

    def _add_compared(
        self, parts: Sequence[Views], pass_name: str, ids: Tensor | None
    ) -> tuple[Tensor, Logs, list[Tensor]]:
        states, found = [], []
        with torch.no_grad(), frozen_statistics(self.method), self.autocast():
            for images in parts:
                states.append(random_state.get())
                found.append(self.method.encode(self.method.augment(images), pass_name))
        outputs = [rows.requires_grad_() for rows in _concatenate(found)]
        with self.autocast():
            loss, logs = self.method.loss(outputs, pass_name, ids)
        of_outputs = torch.autograd.grad(self.scale(loss), outputs)
        gradients = zip(*(rows.chunk(len(parts)) for rows in of_outputs), strict=True)
        for number, (images, state, gradient) in enumerate(zip(parts, states, gradients, strict=True), 1):
            random_state.restore(state)  # The same views, and the same dropout.
            with distributed.average_gradients(self.encoder, number == len(parts)):
                with self.autocast():
                    again = self.encoder(self.method.augment(images), pass_name)
                torch.autograd.backward(again, gradient)
        return loss, logs, outputs


def _divide(images: Views, parts: int) -> Sequence[Views]:
    if isinstance(images, Tensor):
        return images.chunk(parts)
    return list(zip(*(view.chunk(parts) for view in images), strict=True))


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean(0)


def _concatenate(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Concatenates the rows of each output of all parts."""
    return [rows[0] if len(rows) == 1 else torch.cat(rows) for rows in zip(*parts, strict=True)]


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keeps the running statistics of BatchNorm as they are; it normalises batches by their own."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
