"""The work that is timed: its inputs, its exact results in float64, and the flop that it needs.

Everything follows the formulas, block by block of rows, and shares no code with relssl.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

STUDENT, TEACHER = 0.1, 0.04  # ReSSL
INFO_NCE, NT_XENT = 0.2, 0.5  # MoCo v2; SimCLR, CC and SACC
BLOCK = 2**26 if torch.cuda.is_available() else 2**21  # similarities in memory for the exact results

TITLES = {
    "relation": "relation loss",
    "relation_ids": "relation loss with ids",
    "info_nce": "InfoNCE with a queue",
    "in_queue": "InfoNCE over a queue that holds the positives",
    "nt_xent": "NT-Xent",
    "nt_xent_queue": "NT-Xent with a queue",
    "sacc": "SACC's loss",
    "multi_crop": "relation loss, multi-crop",
    "enqueue": "enqueueing",
    "ressl_step": "a training step of ReSSL",
    "sacc_step": "a training step of SACC",
    "weak_view": "the weak view of ReSSL",
    "strong_view": "the strong view of ReSSL",
    "sacc_view": "the strong view of SACC",
}


@dataclass(frozen=True)
class Case:
    """Work of one size. K is 0 for nt_xent and sacc, which have no queue; V > 1 for multi_crop and sacc.

    The width of a view, which has no embeddings, is its side in pixels.
    """

    work: str
    rows: int
    size: int
    dim: int
    dtype: str = "float32"
    grad: bool = True
    views: int = 1

    @property
    def title(self) -> str:
        passes = ", forward + backward" if self.grad else ", forward"
        return TITLES[self.work] + (passes if self.work in UNITS else "")

    @property
    def shape(self) -> str:
        if self.work.endswith("_view"):
            return f"B {self.rows:,} at {self.dim} px"
        views = f"V {self.views}, " if self.views > 1 else ""
        size = f"K {self.size:,}, " if self.size else ""
        return f"{views}B {self.rows:,}, {size}D {self.dim}, {self.dtype}"

    def __str__(self) -> str:
        return f"{self.title}, {self.shape}"

    @property
    def pairs(self) -> int:
        """The number of similarities of one side."""
        in_batch = {"nt_xent": 1, "nt_xent_queue": 1, "sacc": 2}.get(self.work, 0) * 4 * self.rows**2
        sides = 2 if self.work == "nt_xent_queue" else self.views
        return in_batch + sides * self.rows * self.size

    @property
    def flop(self) -> int:
        """The least flop of products that compute loss and gradient without storing similarities."""
        product = 2 * self.rows * self.size * self.dim  # of one side's rows
        within = 8 * self.rows**2 * self.dim  # of both views with themselves
        with_queue, in_batch = UNITS[self.work](self)
        return product * with_queue + within * in_batch


# The matrix products of a case with the queue, and of a batch of two views with itself: similarities and,
# with a gradient, the means. Within a batch the similarities are needed twice: for the sums, then to weigh
# z_j by E / Z_i + E / Z_j. SACC's clusters are few beside its rows.
UNITS: dict[str, Callable[[Case], tuple[int, int]]] = {
    **dict.fromkeys(("relation", "relation_ids"), lambda case: (4 if case.grad else 2, 0)),
    "multi_crop": lambda case: ((case.views + 1) * (2 if case.grad else 1), 0),
    "info_nce": lambda case: (2 if case.grad else 1, 0),
    "in_queue": lambda case: (2 if case.grad else 1, 0),
    "nt_xent": lambda case: (0, 3 if case.grad else 1),
    "nt_xent_queue": lambda case: (4, 3) if case.grad else (2, 1),
    "sacc": lambda case: (0, 6 if case.grad else 2),
}


class Problem:
    """A case's tensors on a device, with rows of unit norm; `leaves` are those that require grad."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def unit(*shape: int) -> Tensor:
            rows = torch.randn(*shape, case.dim, device=device, generator=generator)
            return F.normalize(rows, dim=-1, out=rows)

        views = (case.views,) if case.views > 1 else ()
        k = unit(case.rows)
        q = F.normalize(
            k + 0.5 * torch.randn(*views, *k.shape, device=device, generator=generator) / case.dim**0.5,
            dim=-1,
        )
        self.q, self.k = q.to(dtype).requires_grad_(), k.to(dtype)
        if case.work in ("nt_xent", "nt_xent_queue"):
            self.k.requires_grad_()
        if case.work == "sacc":
            self.assigned = (10 * self.q.detach()[:, :, :10]).softmax(2).requires_grad_()
        leaves = self.q, self.k, *([self.assigned] if case.work == "sacc" else [])
        self.leaves = [t for t in leaves if t.requires_grad]
        self.queue = unit(case.size).to(dtype)
        if case.work == "in_queue":  # as if k had been enqueued already
            self.queue[: case.rows] = self.k
        self.targets = torch.arange(case.rows, device=device)
        # Those of the rows are not in the queue, so the loss is the one without ids.
        self.ids = self.targets + case.size
        self.queue_ids = torch.arange(case.size, device=device)

    @cached_property
    def columns(self) -> Tensor:
        """The queue in the published code's layout, [D, K]."""
        return self.queue.T.contiguous()

    @cached_property
    def exact(self) -> tuple[dict[str, float], list[Tensor]]:
        """The mean loss ("ce" and "kl" of the relation loss) and its gradient for each leaf, in float64."""
        case = self.case
        queue = self.queue.double()
        losses: dict[str, float] = {}
        if case.work in ("nt_xent", "nt_xent_queue", "sacc"):
            z = [t.detach().double().requires_grad_() for t in self.leaves]
            loss = _sacc(*z) if case.work == "sacc" else _nt_xent(z[0], z[1], queue, NT_XENT)
            return {"ce": loss.item()}, list(torch.autograd.grad(loss, z))
        q = self.q.detach().double().requires_grad_()
        rows = q.flatten(0, -2)
        keys = self.k.double().repeat(case.views, 1)
        targets = self.targets.repeat(case.views)
        total = torch.zeros_like(rows)
        for at in torch.arange(len(rows), device=q.device).split(max(1, BLOCK // max(1, case.size))):
            x = rows[at].detach().requires_grad_()
            logits, teacher = x @ queue.T, keys[at] @ queue.T
            if case.work in ("relation", "relation_ids", "multi_crop"):
                p = F.softmax(teacher / TEACHER, 1)
                loss = -(p * F.log_softmax(logits / STUDENT, 1)).sum()
                entropy = torch.special.entr(p).sum()
                losses["kl"] = losses.get("kl", 0.0) + (loss - entropy).item() / len(rows)
            elif case.work == "info_nce":
                positive = (x * keys[at]).sum(1, keepdim=True)
                logits = torch.cat((positive, logits), 1) / INFO_NCE
                loss = (logits.logsumexp(1) - logits[:, 0]).sum()
            else:
                loss = F.cross_entropy(logits / INFO_NCE, targets[at], reduction="sum")
            losses["ce"] = losses.get("ce", 0.0) + loss.item() / len(rows)
            if case.grad:
                total[at] = torch.autograd.grad(loss, x)[0] / len(rows)
        return losses, [total.view_as(q)]

    def error(self, loss: Tensor, grads: list[Tensor], form: str = "ce", tangential: bool = False) -> float:
        """Returns the largest relative error of a mean loss and of the norms of its gradients over all rows.

        tangential: compares only the gradients' parts orthogonal to each row, for losses that normalise rows.
        """
        losses, expected = self.exact
        worst = abs(loss.item() / losses[form] - 1)
        for x, ours, true in zip(self.leaves, grads, expected, strict=False):
            away, unit = ours.double() - true, x.detach().double()
            if tangential:
                away, true = (g - (g * unit).sum(-1, keepdim=True) * unit for g in (away, true))
            worst = max(worst, (away.norm() / true.norm()).item())
        return worst


def _nt_xent(z1: Tensor, z2: Tensor, queue: Tensor, tau: float) -> Tensor:
    both = torch.cat((z1, z2))
    own = torch.eye(len(both), dtype=torch.bool, device=both.device)
    logits = torch.cat(((both @ both.T / tau).masked_fill(own, -torch.inf), both @ queue.T / tau), 1)
    return F.cross_entropy(logits, torch.arange(len(both), device=both.device).roll(len(z1)))


def _sacc(views: Tensor, assigned: Tensor) -> Tensor:
    """SACC's loss with sigma 1; assigned [3, N, M]."""
    none = views[0, :0]
    loss = _nt_xent(views[0], views[1], none, NT_XENT) + _nt_xent(views[1], views[2], none, NT_XENT)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        c1, c2 = (assigned[view].T / assigned[view].norm(dim=0)[:, None] for view in (i, j))
        loss = loss + _nt_xent(c1, c2, c1[:0], 1.0)
        shares = torch.stack([assigned[view].sum(0) / assigned[view].sum() for view in (i, j)])
        loss = loss + (shares * (shares * shares.shape[1]).log()).sum()
    return loss
