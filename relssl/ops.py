"""The registered torch ops: their schemas, fakes and implementations.

    relssl::lse_and_mean      log-sum-exp and mean of stacked rows: the primitive
    relssl::lse_and_mean_vjp  its vector-Jacobian product
    relssl::relation          the relation loss, teacher entropy, grad_q and grad_k in one call
    relssl::info_nce          InfoNCE and grad_q
    relssl::snapshot          a copy

The last arguments of the first four say what is excluded from the queue, as in backends.common.Exclude: ids,
queue_ids, filled. They default to None, which costs nothing where they are not given.

Ops are opaque to torch.compile and have no autograd of their own: autograd.py has the Functions around them.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from relssl import backends
from relssl.backends.common import Cotangents, Exclude, Saved, Scale, accumulator, without_autocast

_library = torch.library.Library("relssl", "FRAGMENT")


def op(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Turns a function into the op of that schema, on every device."""

    def register(run: Callable) -> Callable:
        name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        _library.impl(name, without_autocast(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"relssl::{name}", fake, lib=_library)
        return getattr(torch.ops.relssl, name).default

    return register


EXCLUDE = "Tensor? ids=None, Tensor? queue_ids=None, Tensor? filled=None"  # the end of a schema
Excluded = Sequence[Tensor | None]
"""Nothing, or the three tensors of an Exclude."""


def exclude_of(ids: Tensor | None, queue_ids: Tensor | None, filled: Tensor | None) -> Exclude | None:
    """Returns what a schema has as three arguments."""
    return None if ids is None and filled is None else Exclude(ids, queue_ids, filled)


def for_views(exclude: Excluded, q: Tensor, k: Tensor, extra: int = 0) -> Excluded:
    """Returns the exclusions of `extra` times k's rows and then of q's, view after view, from those of k."""
    if not exclude or exclude[0] is None:
        return exclude
    return exclude[0].repeat(extra + prod(q.shape[:-1]) // k.shape[0]), *exclude[1:]


def scale_arguments(scale: Scale) -> tuple[list[float], Tensor | None]:
    """Returns a scale as the two arguments that a schema has for it."""
    return ([], scale) if isinstance(scale, Tensor) else (scale, None)


def scale_of(scale: list[float], device_scale: Tensor | None) -> Scale:
    return scale if device_scale is None else device_scale


def _lse_and_mean_fake(
    x: Tensor, queue: Tensor, scale: list[float], device_scale: Tensor | None, num_first: int,
    want_mean: bool, backend: str, ids: Tensor | None = None, queue_ids: Tensor | None = None,
    filled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = accumulator(x.dtype)
    width = x.shape[1] if want_mean else 0
    return x.new_empty(2, x.shape[0], dtype=dtype), x.new_empty(x.shape[0], width, dtype=dtype)


@op(
    "lse_and_mean(Tensor x, Tensor queue, float[] scale, Tensor? device_scale, SymInt num_first,"
    f" bool want_mean, str backend, {EXCLUDE}) -> (Tensor lse, Tensor mean)",
    _lse_and_mean_fake,
)
def lse_and_mean(
    x: Tensor, queue: Tensor, scale: list[float], device_scale: Tensor | None, num_first: int,
    want_mean: bool, backend: str, ids: Tensor | None = None, queue_ids: Tensor | None = None,
    filled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    exclude, run = exclude_of(ids, queue_ids, filled), backends.get(backend)
    lse, mean = run.lse_and_mean(x, queue, scale_of(scale, device_scale), num_first, exclude, want_mean)
    if ids is not None and queue_ids is None:  # Indices on a device are unchecked: a bad one gives NaN.
        bad = (ids < -1) | (ids >= run.num_rows(queue))
        lse.masked_fill_(bad, torch.nan)
        mean.masked_fill_(bad[:, None], torch.nan)
    return lse, mean


def _vjp_fake(
    x: Tensor, queue: Tensor, scale: list[float], device_scale: Tensor | None, lse: Tensor,
    mean: Tensor | None, g_lse: Tensor | None, g_mean: Tensor | None, g_row: Tensor | None, want_x: bool,
    want_queue: bool, backend: str, ids: Tensor | None = None, queue_ids: Tensor | None = None,
    filled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows_x, rows_queue = x.shape[0] if want_x else 0, queue.shape[0] if want_queue else 0
    dtype = accumulator(x.dtype)
    return x.new_empty(rows_x, x.shape[1], dtype=dtype), x.new_empty(rows_queue, x.shape[1], dtype=dtype)


@op(
    "lse_and_mean_vjp(Tensor x, Tensor queue, float[] scale, Tensor? device_scale,"
    " Tensor lse, Tensor? mean, Tensor? g_lse, Tensor? g_mean, Tensor? g_row, bool want_x,"
    f" bool want_queue, str backend, {EXCLUDE}) -> (Tensor grad_x, Tensor grad_queue)",
    _vjp_fake,
)
def _vjp(
    x: Tensor, queue: Tensor, scale: list[float], device_scale: Tensor | None, lse: Tensor,
    mean: Tensor | None, g_lse: Tensor | None, g_mean: Tensor | None, g_row: Tensor | None, want_x: bool,
    want_queue: bool, backend: str, ids: Tensor | None = None, queue_ids: Tensor | None = None,
    filled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return backends.get(backend).vjp(
        Saved(x, queue, scale_of(scale, device_scale)[0], exclude_of(ids, queue_ids, filled), lse, mean),
        Cotangents(g_lse, g_mean, g_row), want_x, want_queue,
    )  # fmt: skip


def vjp(
    x: Tensor,
    queue: Tensor,
    scale: Scale,
    lse: Tensor,
    cotangents: Cotangents,
    *,
    backend: str,
    exclude: Excluded = (),
    mean: Tensor | None = None,
    want_x: bool = True,
    want_queue: bool = False,
) -> tuple[Tensor, Tensor]:
    """Calls relssl::lse_and_mean_vjp with the first of the scales."""
    g = cotangents
    return _vjp(
        x, queue, *scale_arguments(scale), lse, mean, g.g_lse, g.g_mean, g.g_row,
        want_x, want_queue, backend, *exclude,
    )  # fmt: skip


def _relation_fake(
    q: Tensor, k: Tensor, queue: Tensor, scale: list[float], device_scale: Tensor | None, form: str,
    reduction: str, want_grad: bool, want_k: bool, backend: str, ids: Tensor | None = None,
    queue_ids: Tensor | None = None, filled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
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


@op(
    "relation(Tensor q, Tensor k, Tensor queue, float[] scale, Tensor? device_scale, str form,"
    f" str reduction, bool want_grad, bool want_k, str backend, {EXCLUDE})"
    " -> (Tensor loss, Tensor entropy, Tensor grad_q, Tensor lse, Tensor mean_t)",
    _relation_fake,
)
def relation(
    q: Tensor, k: Tensor, queue: Tensor, scale: list[float], device_scale: Tensor | None, form: str,
    reduction: str, want_grad: bool, want_k: bool, backend: str, ids: Tensor | None = None,
    queue_ids: Tensor | None = None, filled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    both = scale_of(scale, device_scale)
    weight, exclude = row_weight(q, reduction), None
    if ids is not None or filled is not None:
        exclude = Exclude(*for_views((ids, queue_ids, filled), q, k, extra=1))
    found = backends.get(backend).relation(q, k, queue, both, form, weight, want_grad, exclude)
    if not want_k:
        return found
    # The rows' grad_k, each of weight 1, are put behind grad_q: an output of its own would cost those who do
    # not want it. There is a row for each student view, since reduction="none" weighs them apart.
    loss, entropy, grad_q, lse, mean_t = found
    lse_t = lse[:, None, : k.shape[0]].expand(2, q.shape[:-1].numel() // k.shape[0], -1).flatten(1)
    mean, rows = (t.expand_as(q).flatten(0, -2) for t in (mean_t, k))
    g_mean = relation_g_mean(q, k, both, form, mean_t.dtype).flatten(0, -2)
    grad_k, _ = vjp(
        rows, queue, both[1:], lse_t, Cotangents(g_mean=g_mean), mean=mean,
        exclude=for_views((ids, queue_ids, filled), q, k), backend=backend,
    )  # fmt: skip
    return loss, entropy, torch.stack((grad_q, grad_k.view(q.shape))), lse, mean_t


def _info_nce_fake(
    q: Tensor, k: Tensor, queue: Tensor, scale: list[float], device_scale: Tensor | None,
    reduction: str, want_grad: bool, backend: str, ids: Tensor | None = None,
    queue_ids: Tensor | None = None, filled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    views, dtype = q.shape[:-1], accumulator(q.dtype)
    loss = q.new_empty(views if reduction == "none" else (), dtype=dtype)
    grad_q = q.new_empty(q.shape if want_grad else (prod(views), 0), dtype=dtype)
    return loss, q.new_empty(views, dtype=dtype), grad_q, q.new_empty(2, prod(views), dtype=dtype)


@op(
    "info_nce(Tensor q, Tensor k, Tensor queue, float[] scale, Tensor? device_scale, str reduction,"
    f" bool want_grad, str backend, {EXCLUDE}) -> (Tensor loss, Tensor sigma, Tensor grad_q, Tensor lse)",
    _info_nce_fake,
)
def info_nce(
    q: Tensor, k: Tensor, queue: Tensor, scale: list[float], device_scale: Tensor | None,
    reduction: str, want_grad: bool, backend: str, ids: Tensor | None = None,
    queue_ids: Tensor | None = None, filled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weight, c, exclude = row_weight(q, reduction), scale_of(scale, device_scale), None
    if ids is not None or filled is not None:
        exclude = Exclude(*for_views((ids, queue_ids, filled), q, k))
    return backends.get(backend).info_nce(q, k, queue, c, weight, want_grad, exclude)


@op("snapshot(Tensor t) -> Tensor", torch.empty_like)
def snapshot(t: Tensor) -> Tensor:
    return t.clone()


def row_weight(q: Tensor, reduction: str) -> float | None:
    """Returns what the reduction multiplies each row's loss with; None for "none"."""
    if reduction == "none":
        return None
    return 1 / prod(q.shape[:-1]) if reduction == "mean" else 1.0


def relation_g_mean(q: Tensor, k: Tensor, scale: Scale, form: str, dtype: torch.dtype) -> Tensor:
    """Returns the relation loss's gradient for the teacher's mean once the terms that cancel are gone.

    It is theta_t - theta_s for "kl" and -theta_s for "ce", in the shape of q.
    """
    theta_s = q.to(dtype) * scale[0]
    return k.to(dtype) * scale[1] - theta_s if form == "kl" else -theta_s
