"""The losses and the queue in plain PyTorch, step by step as in published training code, and shorter NT-Xent.

There the queue has the shape [D, K], and products use a clone of it, since enqueueing modifies it in place.
"""

from math import log

import torch
from torch import Tensor
from torch.nn import functional as F


def relation_loss(q: Tensor, k: Tensor, queue: Tensor, tau_s: float = 0.1, tau_t: float = 0.04) -> Tensor:
    """ReSSL: the mean cross-entropy of q [B, D] against k [B, D] over a queue [D, K]."""
    logits_q = torch.mm(q, queue.clone().detach())
    logits_k = torch.mm(k, queue.clone().detach())
    target = F.softmax(logits_k.detach() / tau_t, dim=1)
    return -torch.sum(target * F.log_softmax(logits_q / tau_s, dim=1), dim=1).mean()


def relation_loss_with_ids(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    ids: Tensor,
    queue_ids: Tensor,
    tau_s: float = 0.1,
    tau_t: float = 0.04,
) -> Tensor:
    """ReSSL over a queue [D, K] without the rows whose id is that of the image."""
    same = ids[:, None] == queue_ids
    least = torch.finfo(q.dtype).min
    logits_q = torch.mm(q, queue.clone().detach()).masked_fill(same, least)
    logits_k = torch.mm(k, queue.clone().detach()).masked_fill(same, least)
    target = F.softmax(logits_k.detach() / tau_t, dim=1)
    return -torch.sum(target * F.log_softmax(logits_q / tau_s, dim=1), dim=1).mean()


def multi_crop(q: Tensor, k: Tensor, queue: Tensor, tau_s: float = 0.1, tau_t: float = 0.04) -> Tensor:
    """ReSSL with several student views: q [V, B, D]. The teacher's logits are repeated for each view."""
    logits_q = torch.mm(q.flatten(0, 1), queue.clone().detach())
    logits_k = torch.mm(k, queue.clone().detach()).repeat(len(q), 1)
    target = F.softmax(logits_k.detach() / tau_t, dim=1)
    return -torch.sum(target * F.log_softmax(logits_q / tau_s, dim=1), dim=1).mean()


def info_nce(q: Tensor, k: Tensor, queue: Tensor, tau: float) -> Tensor:
    """MoCo: the cross-entropy of [positive, negatives] with class 0, for negatives [D, K]."""
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    negative = torch.einsum("nc,ck->nk", q, queue.clone().detach())
    logits = torch.cat((positive, negative), dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def queue_cross_entropy(q: Tensor, queue: Tensor, targets: Tensor, tau: float) -> Tensor:
    """The cross-entropy of queries whose keys are the rows `targets` of the queue [K, D]."""
    return F.cross_entropy(q @ queue.T / tau, targets)


def nt_xent(z1: Tensor, z2: Tensor, tau: float, queue: Tensor | None = None) -> Tensor:
    """The shortest code: the cross-entropy of similarities whose diagonal is -inf; queue [K, D]."""
    z = torch.cat((z1, z2))
    logits = (z @ z.T / tau).fill_diagonal_(-torch.inf)
    if queue is not None:
        logits = torch.cat((logits, z @ queue.T / tau), dim=1)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def sacc(views: Tensor, assigned: Tensor, tau: float) -> Tensor:
    """SACC's loss of embeddings [3, N, D] and assignments [3, N, M] of two weak views and a strong one."""
    w1, w2, s = views
    loss = nt_xent(w1, w2, tau) + nt_xent(w2, s, tau)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        loss = loss + nt_xent(F.normalize(assigned[i].T, dim=1), F.normalize(assigned[j].T, dim=1), 1.0)
        for view in (i, j):
            share = assigned[view].sum(0) / assigned[view].sum()
            loss = loss + log(len(share)) + (share * share.log()).sum()
    return loss


def published_nt_xent(z1: Tensor, z2: Tensor, tau: float) -> Tensor:
    """CC and SACC: the cross-entropy of the positive and the 2N - 2 negatives that a mask selects."""
    n = 2 * len(z1)
    z = torch.cat((z1, z2))
    similarity = z @ z.T / tau
    positive = torch.cat((similarity.diag(len(z1)), similarity.diag(-len(z1)))).reshape(n, 1)
    mask = ~torch.eye(n, dtype=torch.bool, device=z.device)
    rows = torch.arange(len(z1), device=z.device)
    mask[rows, rows + len(z1)] = mask[rows + len(z1), rows] = False
    logits = torch.cat((positive, similarity[mask].reshape(n, -1)), dim=1)
    return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long, device=z.device), reduction="sum") / n


class Queue:
    """ReSSL's and MoCo's queue: columns [D, K], and a pointer that the host reads for every batch."""

    def __init__(self, rows: Tensor) -> None:
        self.columns = rows.T.contiguous()
        self.pointer = torch.zeros(1, dtype=torch.long, device=rows.device)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        size, first = self.columns.shape[1], int(self.pointer)
        if size % len(keys):
            raise ValueError(f"a queue of {size} is not a multiple of {len(keys)}")
        self.columns[:, first : first + len(keys)] = keys.T
        self.pointer[0] = (first + len(keys)) % size
