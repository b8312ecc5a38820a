"""Forward passes on GPUs in two steps: blocks of rows pass over splits of the queue, then the splits are
combined.

A subclass supplies the steps, and how its kernels read tensors and scales. What the first step leaves, its
partials, are stats [3, S, R] and means [S, R, D] of S splits and R rows: shift, sum, divisor and mean as
kernels/forward.py defines them, in the form that the subclass's own combine steps take.
"""

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from relssl.backends.base import Backend, exclude_parts
from relssl.backends.common import Exclude, Scale, flat

Partials = TypeVar("Partials")
KernelScale = TypeVar("KernelScale")


class SplitCombine(Backend, Generic[Partials, KernelScale]):
    """A backend whose kernels leave partials of each split of the queue, which further kernels combine."""

    @abstractmethod
    def kernel_layout(self, t: Tensor) -> Tensor:
        """Returns t [R, D] as the kernels read rows: itself, or a copy."""

    @abstractmethod
    def device_guard(self, x: Tensor) -> AbstractContextManager:
        """Returns a context in which launches go to the device of x."""

    @abstractmethod
    def kernel_scales(self, scale: Scale) -> tuple[KernelScale, ...]:
        """Returns each scale as the kernels take it."""

    @abstractmethod
    def forward(
        self, first: Tensor, second: Tensor, queue: Tensor, scales: tuple[KernelScale, KernelScale],
        exclude: Exclude | None, want_mean: bool,
    ) -> Partials:  # fmt: skip
        """Returns the partials of the rows of `first` [., D], then of `second`, which have a scale each.

        The tensors of exclude are contiguous.
        """

    @abstractmethod
    def combine_lse_and_mean(
        self,
        partials: Partials,
        scales: tuple[KernelScale, KernelScale],
        num_first: int,
        lse: Tensor,
        mean: Tensor,
    ) -> None:
        """Writes what Backend.lse_and_mean returns to lse and mean; a mean of width 0 is not wanted."""

    @abstractmethod
    def combine_relation(
        self,
        q: Tensor,
        k: Tensor,
        scales: tuple[KernelScale, KernelScale],
        teacher: Partials,
        student: Partials,
        offset: int,
        form: str,
        weight: float,
        may_be_empty: bool,
        losses: Tensor,
        loss: Tensor | None,
        entropy: Tensor,
        grad_q: Tensor,
        lse: Tensor,
        mean_t: Tensor,
    ) -> None:
        """Writes what Backend.relation returns to the last arguments.

        The students' rows begin at `offset` of their partials; may_be_empty: rows may have excluded all.
        `losses` takes those of the rows and `loss`, 0-d or None, weight times their sum; a grad_q of width 0
        is not wanted.
        """

    @abstractmethod
    def combine_info_nce(
        self,
        q: Tensor,
        k: Tensor,
        scale: KernelScale,
        partials: Partials,
        weight: float,
        losses: Tensor,
        loss: Tensor | None,
        sigma: Tensor,
        grad_q: Tensor,
        lse: Tensor,
    ) -> None:
        """Writes what Backend.info_nce returns to the last arguments, as combine_relation does."""

    def lse_and_mean(
        self, x: Tensor, queue: Tensor, scale: Scale, num_first: int, exclude: Exclude | None, want_mean: bool
    ) -> tuple[Tensor, Tensor]:
        x, queue, scale = self.kernel_layout(x), self.kernel_layout(queue), _contiguous_float(scale)
        exclude = contiguous(exclude)
        count, dim = x.shape
        lse = x.new_empty(2, count, dtype=torch.float32)
        mean = x.new_empty(count, dim if want_mean else 0, dtype=torch.float32)
        with self.device_guard(x):
            first, second = self.kernel_scales(scale)
            partials = self.forward(x[:num_first], x[num_first:], queue, (first, second), exclude, want_mean)
            self.combine_lse_and_mean(partials, (first, second), num_first, lse, mean)
        return lse, mean

    def relation(
        self, q: Tensor, k: Tensor, queue: Tensor, scale: Scale, form: str, weight: float | None,
        want_grad: bool, exclude: Exclude | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        batch, dim = k.shape
        views = q.shape[:-1]
        q, k, queue = self.kernel_layout(flat(q)), self.kernel_layout(k), self.kernel_layout(queue)
        scale, exclude = _contiguous_float(scale), contiguous(exclude)
        count = q.shape[0]
        lse = q.new_empty((2, batch + count), dtype=torch.float32)
        shapes = views, batch, (*views, dim) if want_grad else (count, 0), (batch, dim)
        losses, entropy, grad_q, mean_t = (lse.new_empty(shape) for shape in shapes)
        loss = None if weight is None else lse.new_empty(())
        with self.device_guard(q):
            c_s, c_t = self.kernel_scales(scale)
            if want_grad:
                teacher = student = self.forward(k, q, queue, (c_t, c_s), exclude, True)
            else:  # The student's mean is a quarter of the work.
                of_k, of_q = exclude_parts(exclude, batch)
                teacher = self.forward(k, k[:0], queue, (c_t, c_t), of_k, True)
                student = self.forward(q, q[:0], queue, (c_s, c_s), of_q, False)
            offset, factor = batch if want_grad else 0, 1.0 if weight is None else weight
            self.combine_relation(
                q, k, (c_s, c_t), teacher, student, offset, form, factor, exclude is not None,
                losses, loss, entropy, grad_q, lse, mean_t,
            )  # fmt: skip
        return losses if loss is None else loss, entropy, grad_q, lse, mean_t

    def info_nce(
        self, q: Tensor, k: Tensor, queue: Tensor, scale: Scale, weight: float | None, want_grad: bool,
        exclude: Exclude | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        views = q.shape[:-1]
        q, k, queue = self.kernel_layout(flat(q)), self.kernel_layout(k), self.kernel_layout(queue)
        scale, exclude = _contiguous_float(scale), contiguous(exclude)
        count, dim = q.shape
        lse = q.new_empty((2, count), dtype=torch.float32)
        shapes = views, views, (*views, dim) if want_grad else (count, 0)
        losses, sigma, grad_q = (lse.new_empty(shape) for shape in shapes)
        loss = None if weight is None else lse.new_empty(())
        with self.device_guard(q):
            (c,) = self.kernel_scales(scale)
            partials = self.forward(q, q[:0], queue, (c, c), exclude, want_grad)
            factor = 1.0 if weight is None else weight
            self.combine_info_nce(q, k, c, partials, factor, losses, loss, sigma, grad_q, lse)
        return losses if loss is None else loss, sigma, grad_q, lse


def contiguous(exclude: Exclude | None) -> Exclude | None:
    return None if exclude is None else Exclude(*(t if t is None else t.contiguous() for t in exclude))


def _contiguous_float(scale: Scale) -> Scale:
    """Returns the scale as kernels read it. The caller must hold it while its address is in use."""
    return scale.float().contiguous() if isinstance(scale, Tensor) else scale
