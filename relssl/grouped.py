"""In-batch losses over the rows of all processes of a group, with gradients for a process's own rows.

    relssl::group_nt_xent      NT-Xent of own rows, with the gradient where the reduction fixes the weights
    relssl::group_nt_xent_vjp  that gradient for any weights
    relssl::group_sum          the sum over processes

NT-Xent compares own rows i with the rows j of all processes, which are gathered once; so are their
log-sum-exps. With both, all of a row's gradient is computed where the row is, and none is reduced:

    grad z_i = c ( g_i sum_j p_ij z_j + sum_j g_j p_ji z_j - (g_i + g_i') z_i' )

The cluster losses need the inner products of their columns alone, which are sums over processes.

Each process returns the loss of its own rows, and its gradient is that of the sum of all processes' losses.
So the mean over processes, as DistributedDataParallel takes it, is that of one process with the whole batch.
"""

from typing import Any

import torch
from torch import Tensor

from relssl import backends, ops
from relssl._compat import in_functorch_transform
from relssl.autograd import Settings, number_of, queue_gradient, scales, tensor_of
from relssl.backends import tiles
from relssl.backends.base import Backend, twice
from relssl.backends.clusters import EMPTY
from relssl.backends.common import (
    Cotangents,
    Exclude,
    Saved,
    Temperature,
    accumulator,
    autocast_off,
    device_type,
    to_dtype,
    total,
)
from relssl.backends.reference import nan_if_invalid
from relssl.backends.sharded import merge
from relssl.clusters import penalty
from relssl.groups import Group, all_gather, all_reduce_sum
from relssl.saving import distinct, read_again, save, snapshots
from relssl.validation import compute_dtype


def _loss_fake(
    z1: Tensor, z2: Tensor, queue: Tensor | None, scale: list[float], device_scale: Tensor | None,
    reduction: str, group: str, backend: str, ids: Tensor | None = None, queue_ids: Tensor | None = None,
    filled: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, dim, dtype = 2 * z1.shape[0], z1.shape[1], accumulator(z1.dtype)
    everyone, fixed = rows * Group(group).size, reduction != "none"
    return (
        z1.new_empty(() if fixed else rows, dtype=dtype),
        z1.new_empty(rows, dim, dtype=dtype),
        z1.new_empty(rows, dtype=dtype),
        z1.new_empty(2, rows, dtype=dtype),
        z1.new_empty(0 if fixed else everyone, dim),
        z1.new_empty(2, 0 if fixed else everyone, dtype=dtype),
    )


@ops.op(
    "group_nt_xent(Tensor z1, Tensor z2, Tensor? queue, float[] scale, Tensor? device_scale, str reduction,"
    f" str group, str backend, {ops.EXCLUDE})"
    " -> (Tensor loss, Tensor grad, Tensor slope, Tensor lse, Tensor all_z, Tensor all_lse)",
    _loss_fake,
)
def loss_op(
    z1: Tensor, z2: Tensor, queue: Tensor | None, scale: list[float], device_scale: Tensor | None,
    reduction: str, group: str, backend: str, ids: Tensor | None = None, queue_ids: Tensor | None = None,
    filled: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Returns the loss, its gradient, the derivatives [2B] of the rows' losses by 1/temperature, their
    log-sum-exps, and for reduction "none" all rows [N, D] and log-sum-exps [2, N].

    The gradient is that of all rows' losses with their weights; for "none" the means of the own rows'
    softmaxes instead, of which `vjp_op` makes the gradient.
    """
    z, run, both = torch.cat((z1, z2)), backends.get(backend), ops.scale_of(scale, device_scale)
    processes, rows, weight = Group(group), len(z), ops.row_weight(z, reduction)
    processes.counts("the views of a loss", (rows // 2,), z)
    all_z = all_gather(z, processes)
    first = processes.rank * rows
    own = Exclude(torch.arange(first, first + rows, device=z.device), None, None)
    lse, mean = run.local.lse_and_mean(z, all_z, twice(both), rows, own, True)
    if queue is not None:
        exclude = ops.exclude_of(*ops.for_views((ids, queue_ids, filled), z, z1))
        lse_q, mean_q = run.lse_and_mean(z, queue, twice(both), rows, exclude, True)
        lse, mean = merge(torch.stack([torch.cat((m, t.T), 1) for t, m in ((lse, mean), (lse_q, mean_q))]))
    all_lse = all_gather(lse.T.contiguous(), processes).T
    x = to_dtype(z, lse.dtype)
    positive = (x * x.roll(rows // 2, 0)).sum(1)
    slope = (x * mean).sum(1) - positive
    loss = lse[0] - positive * both[0] + lse[1]
    if weight is None:
        return loss, mean, slope, lse, all_z, all_lse.contiguous()
    g = torch.full_like(loss, weight)
    all_g = g.new_full((len(all_z),), weight)
    grad = _gradient(run.local, z, all_z, both[0], all_lse, mean, g, all_g, first)
    return total(loss, weight), grad, slope, lse, all_z[:0].clone(), all_lse[:, :0].clone()


def _gradient(
    run: Backend, z: Tensor, all_z: Tensor, c: float | Tensor, all_lse: Tensor, mean: Tensor, g: Tensor,
    all_g: Tensor, first: int,
) -> Tensor:  # fmt: skip
    """Returns the gradient of the sum of all rows' losses with weights all_g [N] for z [2B, D], own rows.

    first: the index of the first own row.
    """
    at = torch.arange(len(all_z), device=z.device) - first
    own = Exclude(at.masked_fill((at < 0) | (at >= len(z)), -1), None, None)
    _, columns = run.vjp(Saved(all_z, z, c, own, all_lse, None), Cotangents(all_g), False, True)
    return columns + (mean * g[:, None] - tiles.positive_terms(to_dtype(z, mean.dtype), g)) * c


def _vjp_fake(
    z: Tensor, all_z: Tensor, scale: list[float], device_scale: Tensor | None, all_lse: Tensor, mean: Tensor,
    g: Tensor, group: str, backend: str,
) -> Tensor:  # fmt: skip
    return mean.new_empty(mean.shape)


@ops.op(
    "group_nt_xent_vjp(Tensor z, Tensor all_z, float[] scale, Tensor? device_scale, Tensor all_lse,"
    " Tensor mean, Tensor g, str group, str backend) -> Tensor",
    _vjp_fake,
)
def vjp_op(
    z: Tensor, all_z: Tensor, scale: list[float], device_scale: Tensor | None, all_lse: Tensor, mean: Tensor,
    g: Tensor, group: str, backend: str,
) -> Tensor:  # fmt: skip
    processes, (c, *_) = Group(group), ops.scale_of(scale, device_scale)
    run, all_g, first = backends.get(backend).local, all_gather(g, processes), processes.rank * len(z)
    return _gradient(run, z, all_z, c, all_lse, mean, g, all_g, first)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("double backward cannot pass through a loss over a group")


class GroupNTXent(torch.autograd.Function):
    """The reduced loss of the own rows. Forward computes the gradient of the views, but for "none"."""

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        queue: Tensor | None,
        tau: Temperature,
        settings: Settings,
        group: str,
        *exclude: Tensor | None,
    ) -> Tensor:
        dtype, backend, reduction, _ = settings
        needs_queue = ctx.needs_input_grad[2]
        if torch.compiler.is_compiling():
            z1, z2, queue, tau, *copies = snapshots(
                (z1, True),
                (z2, True),
                (queue, needs_queue),
                (tau, True),
                *((t, needs_queue) for t in exclude),
            )
            exclude = tuple(copies)
        rows = None if queue is None else to_dtype(queue, dtype)
        scale = ops.scale_arguments(scales((tau,), z1))
        loss, *results = loss_op(
            to_dtype(z1, dtype), to_dtype(z2, dtype), rows, *scale, reduction, group, backend, *exclude
        )
        guarded = z1 if queue is None else queue
        save(ctx, guarded, exclude, needs_queue, (z1, z2, tensor_of(tau)), tuple(results))
        ctx.has_queue = queue is not None
        ctx.number = number_of(tau)
        ctx.settings, ctx.group = settings, group
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        z1, z2, tau, grad, slope, lse, all_z, all_lse, *rest = ctx.saved_tensors
        needs_1, needs_2, needs_queue, needs_tau, *others = ctx.needs_input_grad
        none = (None,) * len(others)
        dtype, backend, reduction, _ = ctx.settings
        (c,) = scale = scales((ctx.number or tau,), z1)
        z = torch.cat((to_dtype(z1, dtype), to_dtype(z2, dtype)))
        weights = (g * (ops.row_weight(z, reduction) or 1)).expand(len(z)).contiguous()
        if reduction == "none":
            grad = vjp_op(z, all_z, *ops.scale_arguments(scale), all_lse, grad, weights, ctx.group, backend)
        else:
            grad = grad * g
        of_queue = None
        if needs_queue:
            queue, exclude = read_again(ctx, rest, len(none) - 1)
            x_queue, by_views = to_dtype(queue, dtype), ops.for_views(exclude, z, z1)
            of_queue = queue_gradient(z, x_queue, scale, lse, Cotangents(weights), backend, by_views)
            of_queue = to_dtype(of_queue, queue.dtype)
        of_1, of_2 = grad.chunk(2)
        return (
            to_dtype(of_1, z1.dtype) if needs_1 else None,
            to_dtype(of_2, z2.dtype) if needs_2 else None,
            of_queue,
            (slope * weights).sum() * (-c * c) if needs_tau else None,
            *none,
        )


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    queue: Tensor | None,
    tau: Temperature,
    reduction: str,
    backend: str,
    group: Group,
    exclude: ops.Excluded = (),
) -> Tensor:
    """Returns the reduced NT-Xent of checked arguments, this process's rows, over those of a group."""
    _refuse_functorch()
    size = z1 if queue is None else queue
    dtype = compute_dtype(z1, size)
    backend = backends.choose(backend, device_type(z1), dtype, z1.shape[1], (z1, z2), size)
    inputs = distinct(z1, z2, queue, tau, Settings(dtype, backend, reduction), group.name, *exclude)
    return GroupNTXent.apply(*inputs)


def _refuse_functorch() -> None:
    if in_functorch_transform():
        raise RuntimeError(
            "torch.func and forward-mode AD cannot pass through a loss over a group of processes"
        )


@ops.op("group_sum(Tensor value, str group) -> Tensor", lambda value, group: value.new_empty(value.shape))
def sum_op(value: Tensor, group: str) -> Tensor:
    return all_reduce_sum(value, Group(group))


class GroupSum(torch.autograd.Function):
    """The sum over processes, which all compute the same loss of it: backward takes the sum of these."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        ctx.group = group
        return sum_op(value, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        _refuse_double_backward()
        return g * Group(ctx.group).size, None


def cluster_loss(p1: Tensor, p2: Tensor, tau: Temperature, penalize: bool, group: Group) -> Tensor:
    """Returns the cluster loss of checked arguments, this process's rows, over those of a group.

    In float32 or float64, and from sums over processes: the columns' inner products, and their sums.
    """
    _refuse_functorch()
    wide, clusters = accumulator(p1.dtype), p1.shape[1]
    p = torch.cat((to_dtype(p1, wide), to_dtype(p2, wide)), 1)
    with autocast_off(p.device):
        sums = GroupSum.apply(torch.cat((p.T @ p, p.sum(0, keepdim=True))), group.name)
    products, sizes = sums[:-1], sums[-1]
    squares = products.diagonal()
    norms = squares.masked_fill(squares < EMPTY**2, 1.0).sqrt()  # The root of 0 has an infinite gradient.
    logits = products / (norms[:, None] * norms * nan_if_invalid(tau))
    own = torch.eye(2 * clusters, dtype=torch.bool, device=p.device)
    positive = logits.diagonal(clusters).mean()
    loss = logits.masked_fill(own, -torch.inf).logsumexp(1).mean() - positive
    return loss + penalty(sizes[:clusters]) + penalty(sizes[clusters:]) if penalize else loss


def cluster_sizes(p: Tensor, group: Group) -> Tensor:
    """Returns the sums [M] of the columns of p [B, M] over all processes."""
    _refuse_functorch()
    return GroupSum.apply(p.sum(0), group.name)
