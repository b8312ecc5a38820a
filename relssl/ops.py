"""The registered torch ops and their autograd: the one place where tensors meet kernels.

    relssl::rows       lse and mean of stacked rows: the primitive
    relssl::rows_vjp   its vector-Jacobian product
    relssl::relation   the relation loss, teacher entropy, grad_q and grad_k in one call
    relssl::info_nce   InfoNCE and grad_q
    relssl::snapshot   a copy

Ops are opaque to torch.compile and know nothing of autograd. The autograd.Functions around them compute
gradients in the forward pass, so the queue may change before backward: they keep a plain reference to
it, and a backward that must read the queue again raises if it has changed. Double backward recomputes
the result with the reference, which can be differentiated any number of times.

torch.compile moves operations that only backward uses behind the rest of the graph, such as an enqueue,
and checks no versions. So gradients made in forward come from the op that makes the loss, and what
backward reads of the inputs are snapshots, which the loss reads too.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from relssl import backends
from relssl.arguments import batched, compute_dtype, normal, saving_is_hooked, transformed
from relssl.backends import chunked, common, reference
from relssl.backends.common import Scale, Temperature, accumulator, cast, without_autocast

_lib = torch.library.Library("relssl", "FRAGMENT")


def _op(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Turn a function into the op of that schema, on every device."""

    def register(run: Callable) -> Callable:
        name = _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        _lib.impl(name, without_autocast(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"relssl::{name}", fake, lib=_lib)
        return getattr(torch.ops.relssl, name).default

    return register


def _scales(temperatures: Sequence[Temperature], x: Tensor) -> Scale:
    """1/temperature; where one is a tensor, all become one, in which a bad temperature is NaN."""
    numbers = [1 / t for t in temperatures if not isinstance(t, Tensor)]
    if len(numbers) == len(temperatures):
        return numbers
    kind: dict[str, Any] = {"dtype": accumulator(x.dtype), "device": x.device}
    tau = torch.stack(
        [t.to(**kind) if isinstance(t, Tensor) else torch.full((), t, **kind) for t in temperatures]
    )
    return tau.reciprocal().masked_fill_(~((tau > 0) & tau.isfinite()), torch.nan)


def _pass(scale: Scale) -> tuple[list[float], Tensor | None]:
    """A scale as the two arguments that an op's schema has for it."""
    return ([], scale) if isinstance(scale, Tensor) else (scale, None)


# ------------------------------------------------------------------------------------------- ops


def _rows_fake(x, queue, scale, device_scale, split, exclude, want_mean, backend):
    dtype = accumulator(x.dtype)
    width = x.shape[1] if want_mean else 0
    return x.new_empty(2, x.shape[0], dtype=dtype), x.new_empty(x.shape[0], width, dtype=dtype)


@_op(
    "rows(Tensor x, Tensor queue, float[] scale, Tensor? device_scale, SymInt split, Tensor? exclude,"
    " bool want_mean, str backend) -> (Tensor lse, Tensor mean)",
    _rows_fake,
)
def _rows(x, queue, scale, device_scale, split, exclude, want_mean, backend):
    scale = scale if device_scale is None else device_scale
    lse, mean = backends.get(backend).rows(x, queue, scale, split, exclude, want_mean)
    if exclude is not None:  # On a device nobody has looked at its values: a bad one makes its row NaN.
        bad = (exclude < -1) | (exclude >= len(queue))
        lse.masked_fill_(bad, torch.nan)
        mean.masked_fill_(bad[:, None], torch.nan)
    return lse, mean


def _rows_vjp_fake(
    x,
    queue,
    scale,
    device_scale,
    exclude,
    lse,
    mean,
    g_lse,
    g_mean,
    g_row,
    want_x,
    want_queue,
    backend,
):
    rows_x, rows_queue = x.shape[0] if want_x else 0, queue.shape[0] if want_queue else 0
    dtype = accumulator(x.dtype)
    return x.new_empty(rows_x, x.shape[1], dtype=dtype), x.new_empty(rows_queue, x.shape[1], dtype=dtype)


@_op(
    "rows_vjp(Tensor x, Tensor queue, float[] scale, Tensor? device_scale, Tensor? exclude, Tensor lse,"
    " Tensor? mean, Tensor? g_lse, Tensor? g_mean, Tensor? g_row, bool want_x, bool want_queue,"
    " str backend) -> (Tensor grad_x, Tensor grad_queue)",
    _rows_vjp_fake,
)
def _rows_vjp(
    x,
    queue,
    scale,
    device_scale,
    exclude,
    lse,
    mean,
    g_lse,
    g_mean,
    g_row,
    want_x,
    want_queue,
    backend,
):
    scale = (scale if device_scale is None else device_scale)[0]
    run = getattr(backends.get(backend), "vjp", chunked.vjp)
    return run(x, queue, scale, exclude, lse, mean, g_lse, g_mean, g_row, want_x, want_queue)


def _relation_fake(q, k, queue, scale, device_scale, form, reduction, want_grad, want_k, backend):
    dtype = accumulator(q.dtype)
    views = q.shape[:-1]
    rows = prod(views)  # torch.compile makes a constant of views.numel().
    return (
        q.new_empty(views if reduction == "none" else (), dtype=dtype),
        k.new_empty(k.shape[0], dtype=dtype),
        q.new_empty((2,) * want_k + q.shape if want_grad else (rows, 0), dtype=dtype),
        q.new_empty(2, k.shape[0] + rows, dtype=dtype),
        k.new_empty(k.shape, dtype=dtype),
    )


@_op(
    "relation(Tensor q, Tensor k, Tensor queue, float[] scale, Tensor? device_scale, str form,"
    " str reduction, bool want_grad, bool want_k, str backend)"
    " -> (Tensor loss, Tensor entropy, Tensor grad_q, Tensor lse, Tensor mean_t)",
    _relation_fake,
)
def _relation(q, k, queue, scale, device_scale, form, reduction, want_grad, want_k, backend):
    scale = scale if device_scale is None else device_scale
    weight = _weight(q, reduction)
    found = backends.get(backend).relation(q, k, queue, scale, form, weight, want_grad)
    if not want_k:
        return found
    # The rows' grad_k, each of weight 1, put behind grad_q: an output of its own would cost those who do not
    # want it. There is a row for each student view, since reduction="none" weighs them apart.
    loss, entropy, grad_q, lse, mean_t = found
    lse_t = lse[:, None, : k.shape[0]].expand(2, q.shape[:-1].numel() // k.shape[0], -1).flatten(1)
    mean, rows = (t.expand_as(q).flatten(0, -2) for t in (mean_t, k))
    g_mean = _cotangent(q, k, scale, form, mean_t.dtype).flatten(0, -2)
    grad_k, _ = _vjp(rows, queue, scale[1:], lse_t, mean=mean, g_mean=g_mean, backend=backend)
    return loss, entropy, torch.stack((grad_q, grad_k.view(q.shape))), lse, mean_t


def _info_nce_fake(q, k, queue, scale, device_scale, reduction, want_grad, backend):
    views, kind = q.shape[:-1], {"dtype": accumulator(q.dtype)}
    loss, sigma = q.new_empty(views if reduction == "none" else (), **kind), q.new_empty(views, **kind)
    grad_q = q.new_empty(q.shape if want_grad else (prod(views), 0), **kind)
    return loss, sigma, grad_q, q.new_empty(2, prod(views), **kind)


@_op(
    "info_nce(Tensor q, Tensor k, Tensor queue, float[] scale, Tensor? device_scale, str reduction,"
    " bool want_grad, str backend) -> (Tensor loss, Tensor sigma, Tensor grad_q, Tensor lse)",
    _info_nce_fake,
)
def _info_nce(q, k, queue, scale, device_scale, reduction, want_grad, backend):
    scale = scale if device_scale is None else device_scale
    module, weight = backends.get(backend), _weight(q, reduction)
    if hasattr(module, "info_nce"):
        return module.info_nce(q, k, queue, scale, weight, want_grad)
    return common.info_nce(module.rows, q, k, queue, scale, weight, want_grad)


@_op("snapshot(Tensor t) -> Tensor", torch.empty_like)
def _snapshot(t):
    return t.clone()


# -------------------------------------------------------------------------------------- autograd


def _vjp(
    x: Tensor,
    queue: Tensor,
    scale: Scale,
    lse: Tensor,
    *,
    backend: str,
    exclude: Tensor | None = None,
    mean: Tensor | None = None,
    g_lse: Tensor | None = None,
    g_mean: Tensor | None = None,
    g_row: Tensor | None = None,
    want_x: bool = True,
    want_queue: bool = False,
) -> tuple[Tensor, Tensor]:
    return _rows_vjp(
        x, queue, *_pass(scale), exclude, lse, mean, g_lse, g_mean, g_row, want_x, want_queue, backend
    )


class _Bank:
    """A queue as backward may need it: a plain reference that notices when the queue has changed.

    Saved by autograd it would forbid enqueueing before backward even where nobody reads it again.
    """

    def __init__(self, queue: Tensor) -> None:
        self.queue = queue
        self.version = None if queue.is_inference() else queue._version  # None: changes are not counted

    def get(self) -> Tensor:
        if self.version is None:
            raise RuntimeError(
                "this backward must read the queue again (double backward), but the queue was made under"
                " torch.inference_mode(), where changes are not counted: pass a clone"
            )
        if self.queue._version != self.version:
            raise RuntimeError(
                "this backward must read the queue again (double backward, or the gradient of a mean),"
                " but the queue has changed since the forward pass: enqueue after backward, or pass a clone"
            )
        return self.queue


def _witness(queue: Tensor) -> Tensor:
    """A small tensor whose shape tells the queue's version modulo 1,024, for autograd to save.

    Activation checkpointing runs forward again for backward and raises where the two runs save other shapes:
    so it raises where the queue has moved in between, and the gradient would be another queue's.
    """
    version = 0 if queue.is_inference() else queue._version
    return queue.new_zeros((1 + version % 32, 1 + version // 32 % 32))


def _save(ctx: Any, queue: Tensor, keep: bool, *tensors: Tensor | None) -> None:
    """Save the tensors for backward, and before them the queue or None, which leaves a plain reference to it.

    Where something hooks into what autograd saves, the queue's witness is behind them.
    """
    saved = (queue if keep else None, *tensors)
    if torch.compiler.is_compiling():  # A compiled graph cannot hold a plain reference.
        ctx.bank = None
    else:
        ctx.bank = None if keep else _Bank(queue)
        for t in saved:
            if t is not None and t.is_inference():
                saved = tuple(map(normal, saved))
                break
        if saving_is_hooked():
            saved = *saved, _witness(queue)
    ctx.save_for_backward(*saved)


def _snapshots(*inputs: tuple[Any, bool]) -> list[Any]:
    """The inputs of a compiled graph; of the tensors that backward will read, snapshots."""
    return [_snapshot(t) if read and isinstance(t, Tensor) else t for t, read in inputs]


def _apart(*inputs: Any) -> Sequence[Any]:
    """The inputs as torch.compile takes those of an autograd.Function: a view where a tensor comes again.

    Of a tensor in two slots Dynamo makes one: torch 2.11 then returns wrong gradients, and 2.13 refuses.
    """
    if not torch.compiler.is_compiling():
        return inputs
    twice = [isinstance(t, Tensor) and any(t is u for u in inputs[:i]) for i, t in enumerate(inputs)]
    return [t.view_as(t) if again else t for t, again in zip(inputs, twice, strict=True)]


def _recompute(run: Callable, inputs: Sequence[Any], needs: Sequence[bool], grads: Sequence[Tensor]):
    """Gradients of run(*inputs) that can be differentiated again, None where not needed."""
    needs = needs[: len(inputs)]
    with torch.enable_grad():
        inputs = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(run(*inputs), wanted, grads, create_graph=True))
    return [next(found) if need else None for need in needs]


def _differentiable_backward() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Relation(torch.autograd.Function):
    """The reduced loss and teacher entropy. Gradients of q, k and the temperatures are made in forward."""

    @staticmethod
    def forward(ctx, q, k, queue, tau_s, tau_t, how):
        form, reduction, dtype, backend = how
        _, needs_k, needs_queue, needs_s, needs_t, _ = ctx.needs_input_grad
        if torch.compiler.is_compiling():
            reads_q, reads_k = (q, needs_s or needs_queue), (k, needs_t or needs_queue)
            q, k, queue, tau_s, tau_t = _snapshots(
                reads_q, reads_k, (queue, needs_queue), (tau_s, True), (tau_t, True)
            )
        x_q, x_k, bank = cast(q, dtype), cast(k, dtype), cast(queue, dtype)
        scale = _scales((tau_s, tau_t), q)
        want_k = needs_k or needs_t
        found = _relation(x_q, x_k, bank, *_pass(scale), form, reduction, True, want_k, backend)
        loss, entropy, grad_q, lse, mean_t = found
        grad_q, grad_k = grad_q if want_k else (grad_q, None)
        kept = (lse, mean_t) if needs_queue else (None, None)
        _save(ctx, queue, needs_queue, q, k, _tensor(tau_s), _tensor(tau_t), grad_q, grad_k, *kept)
        ctx.numbers = _number(tau_s), _number(tau_t)
        ctx.how = how
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)  # zeros for the entropy would be a launch
        return loss, entropy

    @staticmethod
    def backward(ctx, g, _):
        queue, q, k, tau_s, tau_t, grad_q, grad_k, lse, mean_t, *_ = ctx.saved_tensors
        needs_q, needs_k, needs_queue, needs_s, needs_t, _ = needs = ctx.needs_input_grad
        if g is None:
            return (None,) * 6
        form, reduction, dtype, backend = ctx.how
        tau_s, tau_t = ctx.numbers[0] or tau_s, ctx.numbers[1] or tau_t
        if _differentiable_backward():
            queue = ctx.bank.get() if queue is None else queue

            def run(*inputs):
                return [reduce(reference.relation(*inputs, form, dtype)[0], reduction)]

            return *_recompute(run, (q, k, queue, tau_s, tau_t), needs, (g,)), None

        g = g[..., None] if reduction == "none" else g
        of_q = _scaled(grad_q, g, q) if needs_q else None
        if not any(needs[1:]):
            return of_q, None, None, None, None, None

        c_s, c_t = scale = _scales((tau_s, tau_t), q)
        of_k = of_queue = of_s = of_t = None
        if needs_s:
            of_s = (q.to(dtype) * (grad_q * g)).sum() * -c_s
        g = g * (_weight(q, reduction) or 1)
        if grad_k is not None:
            grad_k = (grad_k * g).sum_to_size(k.shape)
            of_k = grad_k.to(k.dtype) if needs_k else None
            of_t = (k.to(dtype) * grad_k).sum() * -c_t if needs_t else None
        if needs_queue:  # Row j: sum_b (p_s - p_t) theta_s + p_t (u - ubar) theta_t, over all views.
            x_q, x_k, bank = q.to(dtype), k.to(dtype), queue.to(dtype)
            g_mean = (_cotangent(x_q, x_k, scale, form, mean_t.dtype) * g).sum_to_size(k.shape)
            g_row = (cast(x_q, mean_t.dtype) * (g * -c_s)).sum_to_size(k.shape)
            g = g.expand(*q.shape[:-1], 1).flatten()
            x_q, (lse_t, lse_s) = x_q.flatten(0, -2), lse.split((k.shape[0], g.shape[0]), 1)
            how = {"want_x": False, "want_queue": True, "backend": backend}
            _, by_student = _vjp(x_q, bank, scale[:1], lse_s, g_lse=g, **how)
            _, by_teacher = _vjp(x_k, bank, scale[1:], lse_t, mean=mean_t, g_mean=g_mean, g_row=g_row, **how)
            of_queue = (by_student + by_teacher).to(queue.dtype)
        return of_q, of_k, of_queue, of_s, of_t, None


def _cotangent(q: Tensor, k: Tensor, scale: Scale, form: str, dtype: torch.dtype) -> Tensor:
    """What the loss sends back to the teacher's mean once the terms that cancel are gone.

    theta_t - theta_s for "kl" and -theta_s for "ce", in the shape of q.
    """
    theta_s = q.to(dtype) * scale[0]
    return k.to(dtype) * scale[1] - theta_s if form == "kl" else -theta_s


def _tensor(value: Temperature) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _number(value: Temperature) -> float | None:
    return None if isinstance(value, Tensor) else value


def _weight(q: Tensor, reduction: str) -> float | None:
    """What the contract of relssl/backends calls weight."""
    if reduction == "none":
        return None
    return 1 / prod(q.shape[:-1]) if reduction == "mean" else 1.0


def _scaled(grad_q: Tensor, g: Tensor, q: Tensor) -> Tensor:
    """grad_q g, rounded once, to q's dtype."""
    if grad_q.dtype == q.dtype or torch.compiler.is_compiling() or batched(g):
        return cast(grad_q * g, q.dtype)
    return torch.mul(grad_q, g, out=torch.empty_like(q))  # one launch


def reduce(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


class _InfoNCE(torch.autograd.Function):
    """The reduced loss. With sigma, the negatives' share, every gradient but the queue's is at hand."""

    @staticmethod
    def forward(ctx, q, k, queue, tau, how):
        reduction, dtype, backend = how
        _, needs_k, needs_queue, needs_tau, _ = ctx.needs_input_grad
        if torch.compiler.is_compiling():
            reads_q = q, needs_k or needs_queue or needs_tau
            q, queue, tau = _snapshots(reads_q, (queue, needs_queue), (tau, True))
        scale = _scales((tau,), q)
        x_q, x_k, bank = cast(q, dtype), cast(k, dtype), cast(queue, dtype)
        loss, sigma, grad_q, lse = _info_nce(x_q, x_k, bank, *_pass(scale), reduction, True, backend)
        _save(ctx, queue, needs_queue, q, k, _tensor(tau), sigma, grad_q, lse)
        ctx.number = _number(tau)
        ctx.how = how
        return loss

    @staticmethod
    def backward(ctx, g):
        queue, q, k, tau, sigma, grad_q, lse, *_ = ctx.saved_tensors
        needs_q, needs_k, needs_queue, needs_tau, _ = needs = ctx.needs_input_grad
        reduction, dtype, backend = ctx.how
        tau = ctx.number or tau
        if _differentiable_backward():
            queue = ctx.bank.get() if queue is None else queue

            def run(*inputs):
                return [reduce(reference.info_nce(*inputs, dtype), reduction)]

            return *_recompute(run, (q, k, queue, tau), needs, (g,)), None

        g = g[..., None] if reduction == "none" else g
        of_q = _scaled(grad_q, g, q) if needs_q else None
        if not any(needs[1:]):
            return of_q, None, None, None, None

        (c,) = scale = _scales((tau,), q)
        of_k = of_queue = of_tau = None
        if needs_tau:
            of_tau = (cast(q, dtype) * (grad_q * g)).sum() * -c
        if needs_k or needs_queue:
            g = sigma[..., None] * (g * (_weight(q, reduction) or 1))  # of each row's log-sum-exp
        if needs_k:
            of_k = (cast(q, dtype) * (g * -c)).sum_to_size(k.shape).to(k.dtype)
        if needs_queue:
            x, bank = cast(q, dtype).flatten(0, -2), cast(queue, dtype)
            how = {"want_x": False, "want_queue": True, "backend": backend}
            _, of_queue = _vjp(x, bank, scale, lse, g_lse=g.flatten(), **how)
            of_queue = cast(of_queue, queue.dtype)
        return of_q, of_k, of_queue, of_tau, None


class _LogSumExp(torch.autograd.Function):
    """lse alone, whose gradient is the mean made in forward; or lse and mean, whose backward needs vjp."""

    @staticmethod
    def forward(ctx, x, queue, tau, exclude, want_mean, dtype, backend):
        _, needs_queue, needs_tau, *_ = ctx.needs_input_grad
        if torch.compiler.is_compiling():
            read = needs_queue or want_mean
            x, queue, tau, exclude = _snapshots(
                (x, read or needs_tau), (queue, read), (tau, True), (exclude, read)
            )
        scale = _scales((tau, tau), x)
        x_r, bank = cast(x, dtype), cast(queue, dtype)
        lse, mean = _rows(x_r, bank, *_pass(scale), len(x), exclude, True, backend)
        # A compiled graph cannot hold a plain reference, and in inference mode no changes are counted: there
        # a copy is saved.
        keep = needs_queue or (want_mean and (torch.compiler.is_compiling() or queue.is_inference()))
        _save(ctx, queue, keep, x, _tensor(tau), exclude, lse, mean)
        ctx.number = None if isinstance(tau, Tensor) else tau
        ctx.how = dtype, backend
        ctx.set_materialize_grads(False)
        lse = lse.sum(0)
        return (lse, mean) if want_mean else lse

    @staticmethod
    def backward(ctx, g_lse, g_mean=None):
        queue, x, tau, exclude, lse, mean, *_ = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dtype, backend = ctx.how
        if g_lse is None and g_mean is None:
            return (None,) * 7
        tau = ctx.number if tau is None else tau
        if _differentiable_backward():
            queue = ctx.bank.get() if queue is None else queue
            given = [i for i, g in enumerate((g_lse, g_mean)) if g is not None]

            def run(*inputs):
                both = reference.logsumexp(*inputs, exclude, dtype)
                return [both[i] for i in given]

            grads = [(g_lse, g_mean)[i] for i in given]
            return *_recompute(run, (x, queue, tau), needs, grads), None, None, None, None

        scale = _scales((tau,), x)
        grad_queue = None
        if g_mean is None and not needs[1]:
            grad_x = mean * g_lse[:, None] * scale[0]
        else:
            queue = ctx.bank.get() if queue is None else queue
            grad_x, grad_queue = _vjp(
                x.to(dtype),
                queue.to(dtype),
                scale,
                lse,
                exclude=exclude,
                mean=mean,
                g_lse=g_lse,
                g_mean=g_mean,
                g_row=g_mean,
                want_x=needs[0] or needs[2],
                want_queue=needs[1],
                backend=backend,
            )
        return (
            cast(grad_x, x.dtype) if needs[0] else None,
            cast(grad_queue, queue.dtype) if grad_queue is not None and needs[1] else None,
            (x.to(dtype) * grad_x).sum() * -scale[0] if needs[2] else None,
            *(None,) * 4,
        )


# ------------------------------------------------------------------------------- what functional calls


def _wants_grad(*inputs: Any) -> bool:
    if torch.is_grad_enabled():
        for t in inputs:
            if isinstance(t, Tensor) and t.requires_grad:
                return True
    return False


class _Watched(torch.autograd.Function):
    """A tensor as it is, with the witness of a queue saved behind it."""

    @staticmethod
    def forward(ctx, result, queue):
        _save(ctx, queue, False)
        return result.clone()

    @staticmethod
    def backward(ctx, g):
        _ = ctx.saved_tensors  # which is where checkpointing compares
        return g, None


def _watched(result: Tensor, queue: Tensor) -> Tensor:
    """A result of the reference, whose own backward would not notice that the queue has moved."""
    if not result.requires_grad or torch.compiler.is_compiling() or transformed() or not saving_is_hooked():
        return result
    return _Watched.apply(result, queue)


def _kept(queue: Tensor) -> Tensor:
    """The queue as eager code may save it for backward: enqueueing must not reach it."""
    return queue if queue.requires_grad else queue.clone()


def relation(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    tau_s: Temperature,
    tau_t: Temperature,
    form: str,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The reduced relation loss and the rows [B] of the teacher's entropy. Arguments are checked."""
    dtype = compute_dtype(q, queue)
    backend = backends.choose(backend, q.device.type, dtype, q.shape[-1], (q, k), queue)
    if backend == "reference" or transformed():
        q, k = normal(q), normal(k)
        loss, entropy = reference.relation(q, k, _kept(queue), tau_s, tau_t, form, dtype)
        return _watched(reduce(loss, reduction), queue), entropy.detach()
    if _wants_grad(q, k, queue, tau_s, tau_t):
        inputs = _apart(q, k, queue, tau_s, tau_t)
        return _Relation.apply(*inputs, (form, reduction, dtype, backend))
    scale = _pass(_scales((tau_s, tau_t), q))
    q, k, queue = cast(q, dtype), cast(k, dtype), cast(queue, dtype)
    return _relation(q, k, queue, *scale, form, reduction, False, False, backend)[:2]


def info_nce(q: Tensor, k: Tensor, queue: Tensor, tau: Temperature, reduction: str, backend: str) -> Tensor:
    """The reduced InfoNCE. Arguments are checked."""
    dtype = compute_dtype(q, queue)
    backend = backends.choose(backend, q.device.type, dtype, q.shape[-1], (q,), queue)
    if backend == "reference" or transformed():
        q, k = normal(q), normal(k)
        return _watched(reduce(reference.info_nce(q, k, _kept(queue), tau, dtype), reduction), queue)
    if _wants_grad(q, k, queue, tau):
        return _InfoNCE.apply(*_apart(q, k, queue, tau), (reduction, dtype, backend))
    scale = _pass(_scales((tau,), q))
    q, k, queue = cast(q, dtype), cast(k, dtype), cast(queue, dtype)
    return _info_nce(q, k, queue, *scale, reduction, False, backend)[0]


def logsumexp(
    x: Tensor,
    queue: Tensor,
    tau: Temperature,
    exclude: Tensor | None,
    dtype: torch.dtype,
    want_mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """lse [R] and, if wanted, mean [R, D], computed in one dtype. Arguments are checked."""
    backend = backends.choose(backend, x.device.type, dtype, x.shape[-1], (x,), queue)
    if backend == "reference" or transformed():
        x, exclude = normal(x), normal(exclude)
        lse, mean = reference.logsumexp(x, _kept(queue), tau, exclude, dtype)
        return _watched(lse, queue), _watched(mean, queue)
    if _wants_grad(x, queue, tau):
        found = _LogSumExp.apply(*_apart(x, queue, tau), exclude, want_mean, dtype, backend)
        return found if want_mean else (found, found[:0])
    scale = _pass(_scales((tau, tau), x))
    lse, mean = _rows(x.to(dtype), queue.to(dtype), *scale, len(x), exclude, want_mean, backend)
    return lse.sum(0), mean
