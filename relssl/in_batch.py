"""NT-Xent: its ops, its autograd.Function, and the code that chooses between them.

    relssl::nt_xent      the loss, with the gradient of both views where the reduction fixes the rows' weights
    relssl::nt_xent_vjp  that gradient for any weights, from the log-sum-exps

With z = [z1; z2], c = 1/tau, loss_i = lse_i - c <z_i, z_i'> and weights g_i, and with m_k the rows of the
queue, whose mean_i = sum_k p_ik m_k is weighted by a softmax over all negatives and the positive,

    grad z_i = c ( sum_j (g_i p_ij + g_j p_ji) z_j - (g_i + g_i') z_i' + g_i mean_i )
"""

from typing import Any

import torch
from torch import Tensor

from relssl import backends, ops
from relssl._compat import in_functorch_transform
from relssl.autograd import (
    Settings,
    differentiable_backward,
    number_of,
    queue_gradient,
    recompute,
    reduce,
    scales,
    tensor_of,
)
from relssl.backends import reference
from relssl.backends.base import twice
from relssl.backends.common import Cotangents, Scale, Temperature, accumulator, device_type, to_dtype
from relssl.dispatch import wants_grad
from relssl.saving import distinct, read_again, save, snapshots, unaliased, with_version
from relssl.validation import compute_dtype, savable


def _loss_fake(
    z1: Tensor, z2: Tensor, queue: Tensor | None, scale: list[float], device_scale: Tensor | None,
    reduction: str, want_grad: bool, backend: str, ids: Tensor | None = None,
    queue_ids: Tensor | None = None, filled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, dim, dtype = 2 * z1.shape[0], z1.shape[1], accumulator(z1.dtype)
    shapes = (
        (rows,) if reduction == "none" else (),
        (rows if want_grad and reduction != "none" else 0, dim),
        (2, rows),
        (rows if want_grad and queue is not None else 0, dim),
    )
    loss, grad, lse, mean = (z1.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, grad, lse, mean


@ops.op(
    "nt_xent(Tensor z1, Tensor z2, Tensor? queue, float[] scale, Tensor? device_scale, str reduction,"
    f" bool want_grad, str backend, {ops.EXCLUDE}) -> (Tensor loss, Tensor grad, Tensor lse, Tensor mean)",
    _loss_fake,
)
def loss_op(
    z1: Tensor, z2: Tensor, queue: Tensor | None, scale: list[float], device_scale: Tensor | None,
    reduction: str, want_grad: bool, backend: str, ids: Tensor | None = None,
    queue_ids: Tensor | None = None, filled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    z, run, both = torch.cat((z1, z2)), backends.get(backend), ops.scale_of(scale, device_scale)
    weight = ops.row_weight(z, reduction)
    queue_lse = mean = None
    if queue is not None:
        exclude = ops.exclude_of(*ops.for_views((ids, queue_ids, filled), z, z1))
        queue_lse, mean = run.lse_and_mean(z, queue, twice(both), len(z), exclude, want_grad)
    loss, grad, lse = run.local.nt_xent(z, both, queue_lse, weight, want_grad and weight is not None)
    if queue_lse is None or mean is None or not want_grad:
        return loss, grad, lse, lse.new_empty(0, z.shape[1])
    high, low = queue_lse - lse
    mean *= (high + low).exp_()[:, None]
    if weight is not None:
        grad += mean * (both[0] * weight)
    return loss, grad, lse, mean


def _vjp_fake(
    z: Tensor, scale: list[float], device_scale: Tensor | None, lse: Tensor, g: Tensor, backend: str
) -> Tensor:
    return lse.new_empty(z.shape)


@ops.op(
    "nt_xent_vjp(Tensor z, float[] scale, Tensor? device_scale, Tensor lse, Tensor g, str backend) -> Tensor",
    _vjp_fake,
)
def vjp_op(
    z: Tensor, scale: list[float], device_scale: Tensor | None, lse: Tensor, g: Tensor, backend: str
) -> Tensor:
    return backends.get(backend).local.nt_xent_vjp(z, ops.scale_of(scale, device_scale), lse, g)


class NTXent(torch.autograd.Function):
    """The reduced loss. Forward computes the gradient of the views, backward only that of "none"."""

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        queue: Tensor | None,
        tau: Temperature,
        settings: Settings,
        *exclude: Tensor | None,
    ) -> Tensor:
        dtype, backend, reduction, _ = settings
        _, _, needs_queue, needs_tau = ctx.needs_input_grad[:4]
        if torch.compiler.is_compiling():
            read = needs_queue or needs_tau or reduction == "none"
            z1, z2, queue, tau, *copies = snapshots(
                (z1, read), (z2, read), (queue, needs_queue), (tau, True),
                *((t, needs_queue) for t in exclude),
            )  # fmt: skip
            exclude = tuple(copies)
        rows = None if queue is None else to_dtype(queue, dtype)
        scale = ops.scale_arguments(scales((tau,), z1))
        loss, grad, lse, mean = loss_op(
            to_dtype(z1, dtype), to_dtype(z2, dtype), rows, *scale, reduction, True, backend, *exclude
        )
        guarded = z1 if queue is None else queue
        save(ctx, guarded, exclude, needs_queue, (z1, z2, tensor_of(tau)), (grad, lse, mean))
        ctx.has_queue = queue is not None
        ctx.number = number_of(tau)
        ctx.settings = settings
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z1, z2, tau, grad, lse, mean, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_1, needs_2, needs_queue, needs_tau = needs[:4]
        none = (None,) * (len(needs) - 4)  # of the settings and what is excluded
        dtype, backend, reduction, _ = ctx.settings
        tau = ctx.number or tau
        if differentiable_backward(backend):
            queue, exclude = read_again(ctx, rest, len(none)) if ctx.has_queue else (None, ())

            def run(z1: Tensor, z2: Tensor, queue: Tensor | None, tau: Temperature) -> list[Tensor]:
                return [reduce(reference.nt_xent(z1, z2, queue, tau, dtype, exclude), reduction)]

            return *recompute(run, (z1, z2, queue, tau), needs, (g,)), *none

        of_queue = of_tau = None
        fixed = reduction != "none"
        if fixed:  # Forward had the rows' weights.
            grad = grad * g
        if needs_tau or needs_queue or not fixed:
            (c,) = scale = scales((tau,), z1)
            z = torch.cat((to_dtype(z1, dtype), to_dtype(z2, dtype)))
            weights = (g * (ops.row_weight(z, reduction) or 1)).expand(len(z))
            if not fixed:
                grad = vjp_op(z, *ops.scale_arguments(scale), lse, weights.contiguous(), backend)
                if ctx.has_queue:
                    grad += mean * (weights * c)[:, None]
            if needs_tau:  # <z, grad> has the pairs' term twice, and the queue's once.
                of_tau = (z * grad).sum() * (-c / 2)
                if ctx.has_queue:
                    of_tau -= ((z * mean).sum(1) * weights).sum() * (c * c / 2)
            if needs_queue:
                queue, exclude = read_again(ctx, rest, len(none))
                x_queue, by_views = to_dtype(queue, dtype), ops.for_views(exclude, z, z1)
                of_queue = queue_gradient(z, x_queue, scale, lse, Cotangents(weights), backend, by_views)
                of_queue = to_dtype(of_queue, queue.dtype)
        of_1, of_2 = grad.chunk(2)
        of_1 = to_dtype(of_1, z1.dtype) if needs_1 else None
        return of_1, to_dtype(of_2, z2.dtype) if needs_2 else None, of_queue, of_tau, *none


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    queue: Tensor | None,
    tau: Temperature,
    reduction: str,
    backend: str,
    exclude: ops.Excluded = (),
) -> Tensor:
    """Returns the reduced NT-Xent of checked arguments."""
    size = z1 if queue is None else queue
    dtype = compute_dtype(z1, size)
    backend = backends.choose(backend, device_type(z1), dtype, z1.shape[1], (z1, z2), size)
    if backend == "reference" or in_functorch_transform():
        backends.refuse_sharded(backend, "torch.func and forward-mode AD")
        z1, z2 = savable(z1), savable(z2)
        rows = None if queue is None else unaliased(queue)
        loss = reduce(reference.nt_xent(z1, z2, rows, tau, dtype, exclude), reduction)
        return loss if queue is None else with_version(loss, queue, exclude)
    if wants_grad(z1, z2, queue, tau):
        settings = Settings(dtype, backend, reduction)
        return NTXent.apply(*distinct(z1, z2, queue, tau, settings, *exclude))
    scale: Scale = scales((tau,), z1)
    rows = None if queue is None else to_dtype(queue, dtype)
    views = to_dtype(z1, dtype), to_dtype(z2, dtype)
    return loss_op(*views, rows, *ops.scale_arguments(scale), reduction, False, backend, *exclude)[0]
