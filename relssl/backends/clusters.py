"""The cluster loss over a backend's NT-Xent, in few operations: each takes as long as its call.

With c_m = p_m / |p_m| the unit column of a cluster, h_m NT-Xent's gradient for it, s_m the cluster's share
of its view and S the sum over that view,

    grad p_m = (h_m - <h_m, c_m> c_m) / |p_m| + (log s_m - sum_k s_k log s_k) / S
"""

from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from relssl.backends.common import Scale, to_dtype

if TYPE_CHECKING:
    from relssl.backends.base import Backend

EMPTY = 1e-8  # the length of a column below which its cluster is empty


def cluster_loss(
    run: "Backend", p1: Tensor, p2: Tensor, scale: Scale, dtype: torch.dtype, penalize: bool, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what Backend.cluster_loss returns."""
    columns = torch.cat((p1.mT, p2.mT))
    norms = torch.linalg.vector_norm(columns, dim=1, keepdim=True)
    norms.masked_fill_(norms < EMPTY, 1.0)
    unit = columns / norms
    loss, grad, _ = run.nt_xent(to_dtype(unit, dtype), scale, None, 1 / len(unit), want_grad)
    radial = grad.new_empty(0)
    if want_grad:
        radial = (grad * unit).sum(1)
        grad = grad.addcmul_(unit, radial[:, None], value=-1).div_(norms)
    if penalize:
        sizes = columns.sum(1).view(2, -1)
        total = sizes.sum(1, keepdim=True)
        share, least = sizes / total, torch.finfo(sizes.dtype).tiny
        logs = share.clamp_min(least).log_()
        sums = (share * logs).sum(1, keepdim=True)
        loss = loss + (sums.sum() + 2 * log(p1.shape[1]))
        if want_grad:
            grad += ((logs + (share >= least) - (sums + 1)) / total).view(-1, 1)
    return loss, grad.view(-1, *p1.mT.shape).mT.contiguous() if want_grad else grad.view(0, *p1.shape), radial
