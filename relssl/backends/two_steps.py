"""Forward on GPUs: blocks of rows look up splits of the queue, and a second step combines what they found.

What a backend of this kind, `steps`, has for it:

    readable(t)      t [R, D] as its kernels read rows: itself, or a copy
    on(x)            a context in which launches go to the device of x
    scales(scale)    each scale as its kernels take it
    lookup(first, second, queue, scales, exclude, want_mean)
                     for S splits of the queue and R rows, those of `first` [., D] and then of `second`, which
                     have a scale each: stats [3, S, R] and means [S, R, D], reference, sum, divisor and mean
                     as kernels/lookup.py defines them, in the form that its own combine step takes. Without
                     want_mean there are no means.
    combine_rows(found, scales, split, lse, mean)
    combine_relation(q, k, scales, teacher, student, offset, form, weight, loss, total, entropy, grad_q, lse,
                     mean_t)
    combine_info_nce(q, k, scales, found, weight, loss, total, sigma, grad_q, lse)
                     what the contract of relssl/backends calls rows, relation and info_nce, written to the
                     last arguments; found, teacher and student are lookups, in which the students' rows
                     begin at `offset`. loss has the rows, total, 0-d or None, weight times their sum. Means
                     and gradients of width 0 are not wanted.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from relssl.backends.common import Scale, flat


def _held(scale: Scale) -> Scale:
    """As kernels read it, and by name, so that a copy made here lives as long as its address is in use."""
    return scale.float().contiguous() if isinstance(scale, Tensor) else scale


def rows(
    steps: Any, x: Tensor, queue: Tensor, scale: Scale, split: int, exclude: Tensor | None, want_mean: bool
) -> tuple[Tensor, Tensor]:
    x, queue, scale = steps.readable(x), steps.readable(queue), _held(scale)
    exclude = exclude if exclude is None else exclude.contiguous()
    count, dim = x.shape
    lse = x.new_empty(2, count, dtype=torch.float32)
    mean = x.new_empty(count, dim if want_mean else 0, dtype=torch.float32)
    with steps.on(x):
        scales = steps.scales(scale)
        found = steps.lookup(x[:split], x[split:], queue, scales, exclude, want_mean)
        steps.combine_rows(found, scales, split, lse, mean)
    return lse, mean


def relation(
    steps: Any,
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    scale: Scale,
    form: str,
    weight: float | None,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, dim = k.shape
    views = q.shape[:-1]
    q, k, queue = steps.readable(flat(q)), steps.readable(k), steps.readable(queue)
    scale = _held(scale)
    count = q.shape[0]
    lse = q.new_empty((2, batch + count), dtype=torch.float32)
    shapes = views, batch, (*views, dim) if want_grad else (count, 0), (batch, dim)
    loss, entropy, grad_q, mean_t = (lse.new_empty(shape) for shape in shapes)
    total = None if weight is None else lse.new_empty(())
    with steps.on(q):
        c_s, c_t = scales = steps.scales(scale)
        if want_grad:
            teacher = student = steps.lookup(k, q, queue, (c_t, c_s), None, True)
        else:  # The student's mean is a quarter of the work.
            teacher = steps.lookup(k, k[:0], queue, (c_t, c_t), None, True)
            student = steps.lookup(q, q[:0], queue, (c_s, c_s), None, False)
        offset, factor = batch if want_grad else 0, 1.0 if weight is None else weight
        steps.combine_relation(
            q, k, scales, teacher, student, offset, form, factor, loss, total, entropy, grad_q, lse, mean_t
        )
    return loss if total is None else total, entropy, grad_q, lse, mean_t


def info_nce(
    steps: Any, q: Tensor, k: Tensor, queue: Tensor, scale: Scale, weight: float | None, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    views = q.shape[:-1]
    q, k, queue = steps.readable(flat(q)), steps.readable(k), steps.readable(queue)
    scale = _held(scale)
    count, dim = q.shape
    lse = q.new_empty((2, count), dtype=torch.float32)
    shapes = views, views, (*views, dim) if want_grad else (count, 0)
    loss, sigma, grad_q = (lse.new_empty(shape) for shape in shapes)
    total = None if weight is None else lse.new_empty(())
    with steps.on(q):
        (c,) = scales = steps.scales(scale)
        found = steps.lookup(q, q[:0], queue, (c, c), None, want_grad)
        factor = 1.0 if weight is None else weight
        steps.combine_info_nce(q, k, scales, found, factor, loss, total, sigma, grad_q, lse)
    return loss if total is None else total, sigma, grad_q, lse


def variant(steps: Any, lookup: Callable) -> SimpleNamespace:
    """The backend `steps` with another lookup."""
    own = SimpleNamespace(**vars(steps))
    own.lookup = lookup
    for run in (rows, relation, info_nce):
        setattr(own, run.__name__, partial(run, own))
    return own
