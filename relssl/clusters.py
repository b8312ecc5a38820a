"""The cluster losses: their op, its autograd.Function, and the formulas as eager code.

    relssl::cluster_loss  NT-Xent of two views' columns, with or without the penalties; and its gradient

Some 80 small operations would take as long as their calls: forward computes loss and gradient in one.
"""

from math import log
from typing import Any

import torch
from torch import Tensor

from relssl import backends, ops
from relssl._compat import in_functorch_transform
from relssl.autograd import Settings, differentiable_backward, number_of, recompute, scales, tensor_of
from relssl.backends import reference
from relssl.backends.clusters import EMPTY
from relssl.backends.common import Temperature, accumulator, device_type, to_dtype
from relssl.dispatch import wants_grad
from relssl.saving import distinct, save, snapshots
from relssl.validation import compute_dtype, savable


def penalty(sizes: Tensor) -> Tensor:
    """Returns log M less the entropy of the clusters' shares, for their sizes [M] in float32 or float64."""
    share = sizes / sizes.sum()
    # 0 log 0 is 0, but its gradient is not finite.
    return log(len(sizes)) + (share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum()


def eager_loss(p1: Tensor, p2: Tensor, tau: Temperature, dtype: torch.dtype, penalize: bool) -> Tensor:
    """Returns the loss of p1 and p2 [N, M], which can be differentiated any number of times."""
    columns = torch.cat((p1.mT, p2.mT))
    norms = columns.norm(dim=1, keepdim=True)
    # An empty cluster's column stays as it is: divided by its length, it would have an infinite gradient.
    c1, c2 = (columns / norms.masked_fill(norms < EMPTY, 1.0)).chunk(2)
    loss = reference.nt_xent(c1, c2, None, tau, dtype).mean()
    return loss + penalty(p1.sum(0)) + penalty(p2.sum(0)) if penalize else loss


def _loss_fake(
    p1: Tensor, p2: Tensor, scale: list[float], device_scale: Tensor | None, dtype: torch.dtype,
    penalize: bool, want_grad: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    views = 2 if want_grad else 0
    return p1.new_empty(()), p1.new_empty(views, *p1.shape), p1.new_empty(views * p1.shape[1])


@ops.op(
    "cluster_loss(Tensor p1, Tensor p2, float[] scale, Tensor? device_scale, ScalarType dtype, bool penalize,"
    " bool want_grad, str backend) -> (Tensor loss, Tensor grad, Tensor radial)",
    _loss_fake,
)
def loss_op(
    p1: Tensor, p2: Tensor, scale: list[float], device_scale: Tensor | None, dtype: torch.dtype,
    penalize: bool, want_grad: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    both = ops.scale_of(scale, device_scale)
    return backends.get(backend).cluster_loss(p1, p2, both, dtype, penalize, want_grad)


class ClusterLoss(torch.autograd.Function):
    """The loss. Forward computes the gradient of both views."""

    @staticmethod
    def forward(
        ctx: Any, p1: Tensor, p2: Tensor, tau: Temperature, penalize: bool, settings: Settings
    ) -> Tensor:
        if torch.compiler.is_compiling():
            (tau,) = snapshots((tau, True))
        scale = ops.scale_arguments(scales((tau,), p1))
        loss, grad, radial = loss_op(p1, p2, *scale, settings.dtype, penalize, True, settings.backend)
        save(ctx, p1, (), False, (p1, p2, tensor_of(tau)), (grad, radial))
        ctx.number = number_of(tau)
        ctx.penalize, ctx.settings = penalize, settings
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        p1, p2, tau, grad, radial, *_ = ctx.saved_tensors
        needs_1, needs_2, needs_tau, *_ = needs = ctx.needs_input_grad
        tau = ctx.number or tau
        if differentiable_backward(ctx.settings.backend):

            def run(p1: Tensor, p2: Tensor, tau: Temperature) -> list[Tensor]:
                return [eager_loss(p1, p2, tau, ctx.settings.dtype, ctx.penalize)]

            return *recompute(run, (p1, p2, tau), needs, (g,)), None, None

        of_1, of_2 = grad * g
        of_tau = None
        if needs_tau:
            (c,) = scales((tau,), p1)
            of_tau = radial.sum() * g * (-c / 2)
        return of_1 if needs_1 else None, of_2 if needs_2 else None, of_tau, None, None


def cluster_loss(p1: Tensor, p2: Tensor, tau: Temperature, penalize: bool, backend: str) -> Tensor:
    """Returns the loss of checked arguments; `penalize` adds the penalty of both views."""
    wide = accumulator(p1.dtype)
    p1, p2 = to_dtype(p1, wide), to_dtype(p2, wide)
    dtype, count = compute_dtype(p1, p1), p1.shape[0]
    backend = backends.choose(backend, device_type(p1), dtype, count, (p1, p2), p1.mT)
    if backend == "reference" or in_functorch_transform():
        return eager_loss(savable(p1), savable(p2), tau, dtype, penalize)
    if wants_grad(p1, p2, tau):
        return ClusterLoss.apply(*distinct(p1, p2, tau), penalize, Settings(dtype, backend))
    return loss_op(p1, p2, *ops.scale_arguments(scales((tau,), p1)), dtype, penalize, False, backend)[0]
