"""The autograd.Functions around the ops.

Gradients come from the op that makes the loss; saving.py has what backward gets besides. Double backward
recomputes the result with the reference, which can be differentiated any number of times.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relssl import backends, ops
from relssl._compat import is_batched
from relssl.backends import reference
from relssl.backends.common import Cotangents, Scale, Temperature, accumulator, to_dtype
from relssl.saving import read_again, save, snapshots


class Settings(NamedTuple):
    """The arguments of a Function besides tensors."""

    dtype: torch.dtype
    backend: str
    reduction: str = "mean"
    form: str = "kl"


def scales(temperatures: Sequence[Temperature], x: Tensor) -> Scale:
    """Returns 1/temperature; where one is a tensor, all become one tensor, in which a bad one is NaN."""
    numbers = [1 / t for t in temperatures if isinstance(t, NUMBER)]
    if len(numbers) == len(temperatures):
        return numbers
    dtype, device = accumulator(x.dtype), x.device
    tau = torch.stack(
        [
            t.to(device, dtype) if isinstance(t, Tensor) else torch.full((), t, dtype=dtype, device=device)
            for t in temperatures
        ]
    )
    return tau.reciprocal().masked_fill_(~((tau > 0) & tau.isfinite()), torch.nan)


def recompute(
    run: Callable, inputs: Sequence[Any], needs: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Returns gradients of run(*inputs) that can be differentiated again, None where not needed."""
    needs = needs[: len(inputs)]
    with torch.enable_grad():
        inputs = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(run(*inputs), wanted, grads, create_graph=True))
    return [next(found) if need else None for need in needs]


def differentiable_backward(backend: str) -> bool:
    """Whether backward must be differentiable itself. Raises RuntimeError if the queue is sharded."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    backends.refuse_sharded(backend, "double backward")
    return True


class Relation(torch.autograd.Function):
    """The reduced loss and the teacher's entropy. Forward computes the gradients of q, k and temperatures."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        queue: Tensor,
        tau_s: Temperature,
        tau_t: Temperature,
        settings: Settings,
        *exclude: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dtype, backend, reduction, form = settings
        _, needs_k, needs_queue, needs_s, needs_t = ctx.needs_input_grad[:5]
        if torch.compiler.is_compiling():
            reads_q, reads_k = (q, needs_s or needs_queue), (k, needs_t or needs_queue)
            q, k, queue, tau_s, tau_t, *copies = snapshots(
                reads_q, reads_k, (queue, needs_queue), (tau_s, True), (tau_t, True),
                *((t, needs_queue) for t in exclude),
            )  # fmt: skip
            exclude = tuple(copies)
        inputs = to_dtype(q, dtype), to_dtype(k, dtype), to_dtype(queue, dtype)
        scale = ops.scale_arguments(scales((tau_s, tau_t), q))
        want_k = needs_k or needs_t
        loss, entropy, grad_q, lse, mean_t = ops.relation(
            *inputs, *scale, form, reduction, True, want_k, backend, *exclude
        )
        grad_q, grad_k = grad_q if want_k else (grad_q, None)
        kept = (lse, mean_t) if needs_queue else (None, None)
        given = q, k, tensor_of(tau_s), tensor_of(tau_t)
        save(ctx, queue, exclude, needs_queue, given, (grad_q, grad_k, *kept))
        ctx.numbers = number_of(tau_s), number_of(tau_t)
        ctx.settings = settings
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)  # zeros for the entropy would be a launch
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, tau_s, tau_t, grad_q, grad_k, lse, mean_t, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_q, needs_k, needs_queue, needs_s, needs_t = needs[:5]
        none = (None,) * (len(needs) - 5)  # of the settings and what is excluded
        if g is None:
            return (None,) * len(needs)
        dtype, backend, reduction, form = ctx.settings
        tau_s, tau_t = ctx.numbers[0] or tau_s, ctx.numbers[1] or tau_t
        if differentiable_backward(backend):
            queue, exclude = read_again(ctx, rest, len(none))

            def run(
                q: Tensor, k: Tensor, queue: Tensor, tau_s: Temperature, tau_t: Temperature
            ) -> list[Tensor]:
                rows, _ = reference.relation(q, k, queue, tau_s, tau_t, form, dtype, exclude)
                return [reduce(rows, reduction)]

            return *recompute(run, (q, k, queue, tau_s, tau_t), needs, (g,)), *none

        g = g[..., None] if reduction == "none" else g
        of_q = _scaled(grad_q, g, q) if needs_q else None
        if not any(needs[1:]):
            return of_q, None, None, None, None, *none

        c_s, c_t = scale = scales((tau_s, tau_t), q)
        of_k = of_queue = of_s = of_t = None
        if needs_s:
            of_s = (q.to(dtype) * (grad_q * g)).sum() * -c_s
        g = g * (ops.row_weight(q, reduction) or 1)
        if grad_k is not None:
            grad_k = (grad_k * g).sum_to_size(k.shape)
            of_k = grad_k.to(k.dtype) if needs_k else None
            of_t = (k.to(dtype) * grad_k).sum() * -c_t if needs_t else None
        if needs_queue:  # Row j: sum_b (p_s - p_t) theta_s + p_t (u - ubar) theta_t, over all views.
            queue, exclude = read_again(ctx, rest, len(none))
            by_views = ops.for_views(exclude, q, k)
            x_q, x_k, x_queue = q.to(dtype), k.to(dtype), queue.to(dtype)
            g_mean = (ops.relation_g_mean(x_q, x_k, scale, form, mean_t.dtype) * g).sum_to_size(k.shape)
            g_row = (to_dtype(x_q, mean_t.dtype) * (g * -c_s)).sum_to_size(k.shape)
            g = g.expand(*q.shape[:-1], 1).flatten()
            x_q, (lse_t, lse_s) = x_q.flatten(0, -2), lse.split((k.shape[0], g.shape[0]), 1)
            of_student, of_teacher = Cotangents(g), Cotangents(None, g_mean, g_row)
            by_student = queue_gradient(x_q, x_queue, scale[:1], lse_s, of_student, backend, by_views)
            by_teacher = queue_gradient(x_k, x_queue, scale[1:], lse_t, of_teacher, backend, exclude, mean_t)
            of_queue = (by_student + by_teacher).to(queue.dtype)
        return of_q, of_k, of_queue, of_s, of_t, *none


def queue_gradient(
    x: Tensor,
    queue: Tensor,
    scale: Scale,
    lse: Tensor,
    cotangents: Cotangents,
    backend: str,
    exclude: ops.Excluded,
    mean: Tensor | None = None,
) -> Tensor:
    return ops.vjp(
        x, queue, scale, lse, cotangents, mean=mean, exclude=exclude, want_x=False, want_queue=True,
        backend=backend,
    )[1]  # fmt: skip


NUMBER = float, int  # A float is no Tensor, but to find that out takes longer.


def tensor_of(value: Temperature) -> Tensor | None:
    return None if isinstance(value, NUMBER) else value


def number_of(value: Temperature) -> float | None:
    return value if isinstance(value, NUMBER) else None


def _scaled(grad_q: Tensor, g: Tensor, q: Tensor) -> Tensor:
    """Returns grad_q g in q's dtype, rounded once."""
    if grad_q.dtype == q.dtype or torch.compiler.is_compiling() or is_batched(g):
        return to_dtype(grad_q * g, q.dtype)
    return torch.mul(grad_q, g, out=torch.empty_like(q))  # one launch


def reduce(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


class InfoNCE(torch.autograd.Function):
    """The reduced loss. sigma, the negatives' share, gives every gradient but the queue's."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        queue: Tensor,
        tau: Temperature,
        settings: Settings,
        *exclude: Tensor | None,
    ) -> Tensor:
        dtype, backend, reduction, _ = settings
        _, needs_k, needs_queue, needs_tau = ctx.needs_input_grad[:4]
        if torch.compiler.is_compiling():
            reads_q = q, needs_k or needs_queue or needs_tau
            q, queue, tau, *copies = snapshots(
                reads_q, (queue, needs_queue), (tau, True), *((t, needs_queue) for t in exclude)
            )
            exclude = tuple(copies)
        inputs = to_dtype(q, dtype), to_dtype(k, dtype), to_dtype(queue, dtype)
        scale = ops.scale_arguments(scales((tau,), q))
        loss, sigma, grad_q, lse = ops.info_nce(*inputs, *scale, reduction, True, backend, *exclude)
        save(ctx, queue, exclude, needs_queue, (q, k, tensor_of(tau)), (sigma, grad_q, lse))
        ctx.number = number_of(tau)
        ctx.settings = settings
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, tau, sigma, grad_q, lse, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_q, needs_k, needs_queue, needs_tau = needs[:4]
        none = (None,) * (len(needs) - 4)  # of the settings and what is excluded
        dtype, backend, reduction, _ = ctx.settings
        tau = ctx.number or tau
        if differentiable_backward(backend):
            queue, exclude = read_again(ctx, rest, len(none))

            def run(q: Tensor, k: Tensor, queue: Tensor, tau: Temperature) -> list[Tensor]:
                return [reduce(reference.info_nce(q, k, queue, tau, dtype, exclude), reduction)]

            return *recompute(run, (q, k, queue, tau), needs, (g,)), *none

        g = g[..., None] if reduction == "none" else g
        of_q = _scaled(grad_q, g, q) if needs_q else None
        if not any(needs[1:]):
            return of_q, None, None, None, *none

        (c,) = scale = scales((tau,), q)
        of_k = of_queue = of_tau = None
        if needs_tau:
            of_tau = (to_dtype(q, dtype) * (grad_q * g)).sum() * -c
        if needs_k or needs_queue:
            g = sigma[..., None] * (g * (ops.row_weight(q, reduction) or 1))  # of each row's log-sum-exp
        if needs_k:
            of_k = (to_dtype(q, dtype) * (g * -c)).sum_to_size(k.shape).to(k.dtype)
        if needs_queue:
            queue, exclude = read_again(ctx, rest, len(none))
            x, x_queue, by_views = (
                to_dtype(q, dtype).flatten(0, -2), to_dtype(queue, dtype), ops.for_views(exclude, q, k)
            )  # fmt: skip
            of_queue = queue_gradient(x, x_queue, scale, lse, Cotangents(g.flatten()), backend, by_views)
            of_queue = to_dtype(of_queue, queue.dtype)
        return of_q, of_k, of_queue, of_tau, *none


class LogSumExp(torch.autograd.Function):
    """lse and mean. The gradient of lse is the mean from forward, that of the mean needs the vjp."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        queue: Tensor,
        tau: Temperature,
        settings: Settings,
        *exclude: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dtype, backend, _, _ = settings
        if torch.compiler.is_compiling():
            x, queue, tau, *copies = snapshots(*((t, True) for t in (x, queue, tau, *exclude)))
            exclude = tuple(copies)
        inputs = to_dtype(x, dtype), to_dtype(queue, dtype)
        scale = ops.scale_arguments(scales((tau, tau), x))
        lse, mean = ops.lse_and_mean(*inputs, *scale, len(x), True, backend, *exclude)
        # A compiled graph cannot hold a plain reference, and in inference mode no changes are counted: there
        # a copy is saved.
        keep = ctx.needs_input_grad[1] or torch.compiler.is_compiling() or queue.is_inference()
        save(ctx, queue, exclude, keep, (x, tensor_of(tau)), (lse, mean))
        ctx.number = number_of(tau)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return lse.sum(0), mean

    @staticmethod
    def backward(ctx: Any, g_lse: Tensor | None, g_mean: Tensor | None) -> tuple[Tensor | None, ...]:
        x, tau, lse, mean, *rest = ctx.saved_tensors
        needs, none = ctx.needs_input_grad[:3], (None,) * (len(ctx.needs_input_grad) - 3)
        dtype, backend, _, _ = ctx.settings
        if g_lse is None and g_mean is None:
            return *(None,) * 3, *none
        tau = ctx.number or tau
        if differentiable_backward(backend):
            queue, exclude = read_again(ctx, rest, len(none))
            given = {i: g for i, g in enumerate((g_lse, g_mean)) if g is not None}

            def run(x: Tensor, queue: Tensor, tau: Temperature) -> list[Tensor]:
                both = reference.logsumexp(x, queue, tau, dtype, exclude)
                return [both[i] for i in given]

            grads = list(given.values())
            return *recompute(run, (x, queue, tau), needs, grads), *none

        scale = scales((tau,), x)
        grad_queue = None
        if g_lse is not None and g_mean is None and not needs[1]:
            grad_x = mean * g_lse[:, None] * scale[0]
        else:
            queue, exclude = read_again(ctx, rest, len(none))
            grad_x, grad_queue = ops.vjp(
                x.to(dtype),
                queue.to(dtype),
                scale,
                lse,
                Cotangents(g_lse, g_mean, g_row=g_mean),
                exclude=exclude,
                mean=mean,
                want_x=needs[0] or needs[2],
                want_queue=needs[1],
                backend=backend,
            )
        return (
            to_dtype(grad_x, x.dtype) if needs[0] else None,
            to_dtype(grad_queue, queue.dtype) if grad_queue is not None and needs[1] else None,
            (x.to(dtype) * grad_x).sum() * -scale[0] if needs[2] else None,
            *none,
        )
