"""The choice of a backend for a call with checked arguments, and of the code that runs it.

The reference serves torch.func and forward-mode AD, an autograd.Function serves calls that need a gradient,
and the op alone serves all others.
"""

from typing import Any

import torch
from torch import Tensor

from relssl import backends, ops
from relssl._compat import in_functorch_transform
from relssl.autograd import InfoNCE, LogSumExp, Relation, Settings, reduce, scales
from relssl.backends import reference
from relssl.backends.common import Temperature, device_type, to_dtype
from relssl.saving import distinct, unaliased, with_version
from relssl.validation import compute_dtype, savable


def wants_grad(*inputs: Any) -> bool:
    if torch.is_grad_enabled():
        for t in inputs:
            if isinstance(t, Tensor) and t.requires_grad:
                return True
    return False


def relation(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    tau_s: Temperature,
    tau_t: Temperature,
    form: str,
    reduction: str,
    backend: str,
    exclude: ops.Excluded = (),
) -> tuple[Tensor, Tensor]:
    """Returns the reduced relation loss and the rows [B] of the teacher's entropy, of checked arguments."""
    dtype = compute_dtype(q, queue)
    backend = backends.choose(backend, device_type(q), dtype, q.shape[-1], (q, k), queue)
    if backend == "reference" or in_functorch_transform():
        backends.refuse_sharded(backend, "torch.func and forward-mode AD")
        q, k = savable(q), savable(k)
        loss, entropy = reference.relation(q, k, unaliased(queue), tau_s, tau_t, form, dtype, exclude)
        return with_version(reduce(loss, reduction), queue, exclude), entropy.detach()
    if wants_grad(q, k, queue, tau_s, tau_t):
        settings = Settings(dtype, backend, reduction, form)
        return Relation.apply(*distinct(q, k, queue, tau_s, tau_t, settings, *exclude))
    scale = ops.scale_arguments(scales((tau_s, tau_t), q))
    q, k, queue = to_dtype(q, dtype), to_dtype(k, dtype), to_dtype(queue, dtype)
    return ops.relation(q, k, queue, *scale, form, reduction, False, False, backend, *exclude)[:2]


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    tau: Temperature,
    reduction: str,
    backend: str,
    exclude: ops.Excluded = (),
) -> Tensor:
    """Returns the reduced InfoNCE of checked arguments."""
    dtype = compute_dtype(q, queue)
    backend = backends.choose(backend, device_type(q), dtype, q.shape[-1], (q,), queue)
    if backend == "reference" or in_functorch_transform():
        backends.refuse_sharded(backend, "torch.func and forward-mode AD")
        q, k = savable(q), savable(k)
        rows = reference.info_nce(q, k, unaliased(queue), tau, dtype, exclude)
        return with_version(reduce(rows, reduction), queue, exclude)
    if wants_grad(q, k, queue, tau):
        return InfoNCE.apply(*distinct(q, k, queue, tau, Settings(dtype, backend, reduction), *exclude))
    scale = ops.scale_arguments(scales((tau,), q))
    q, k, queue = to_dtype(q, dtype), to_dtype(k, dtype), to_dtype(queue, dtype)
    return ops.info_nce(q, k, queue, *scale, reduction, False, backend, *exclude)[0]


def logsumexp(
    x: Tensor, queue: Tensor, tau: Temperature, backend: str, exclude: ops.Excluded = ()
) -> tuple[Tensor, Tensor]:
    """Returns lse [R] and mean [R, D] of checked arguments."""
    dtype = compute_dtype(x, queue)
    backend = backends.choose(backend, device_type(x), dtype, x.shape[-1], (x,), queue)
    if backend == "reference" or in_functorch_transform():
        backends.refuse_sharded(backend, "torch.func and forward-mode AD")
        lse, mean = reference.logsumexp(savable(x), unaliased(queue), tau, dtype, exclude)
        return with_version(lse, queue, exclude), with_version(mean, queue, exclude)
    if wants_grad(x, queue, tau):
        return LogSumExp.apply(*distinct(x, queue, tau, Settings(dtype, backend), *exclude))
    scale = ops.scale_arguments(scales((tau, tau), x))
    lse, mean = ops.lse_and_mean(x.to(dtype), queue.to(dtype), *scale, len(x), True, backend, *exclude)
    return lse.sum(0), mean
