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
    "info_nce": "InfoNCE with a queue",
    "in_queue": "InfoNCE over a queue that holds the positives",
    "nt_xent": "NT-Xent",
    "multi_crop": "relation loss, multi-crop",
    "enqueue": "enqueueing",
    "ressl_step": "a training step of ReSSL",
    "sacc_step": "a training step of SACC",
}


@dataclass(frozen=True)
class Case:
    """Work of one size. K is 0 for nt_xent, which has no queue; V > 1 only for multi_crop."""

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
        views = f"V {self.views}, " if self.views > 1 else ""
        size = f"K {self.size:,}, " if self.size else ""
        return f"{views}B {self.rows:,}, {size}D {self.dim}, {self.dtype}"

    def __str__(self) -> str:
        return f"{self.title}, {self.shape}"

    @property
    def pairs(self) -> int:
        """The number of similarities of one side."""
        return 4 * self.rows**2 if self.work == "nt_xent" else self.views * self.rows * self.size

    @property
    def flop(self) -> int:
        """The least flop of products that compute loss and gradient without storing similarities."""
        product = 2 * self.rows * (self.size or 4 * self.rows) * self.dim  # of one side's rows
        return product * UNITS[self.work](self)


# The matrix products of a case: similarities and, with a gradient, the queue's means.
UNITS: dict[str, Callable[[Case], int]] = {
    "relation": lambda case: 4 if case.grad else 2,
    "multi_crop": lambda case: (case.views + 1) * (2 if case.grad else 1),
    "info_nce": lambda case: 2 if case.grad else 1,
    "in_queue": lambda case: 2 if case.grad else 1,
    "nt_xent": lambda case: 3 if case.grad else 1,  # the sums, then again with (E / Z_i + E / Z_j) z_j
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
        if case.work == "nt_xent":
            self.k.requires_grad_()
        self.leaves = [t for t in (self.q, self.k) if t.requires_grad]
        self.queue = unit(case.size).to(dtype)
        if case.work == "in_queue":  # as if k had been enqueued already
            self.queue[: case.rows] = self.k
        self.targets = torch.arange(case.rows, device=device)

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
        if case.work == "nt_xent":
            z = [t.detach().double().requires_grad_() for t in self.leaves]
            both = torch.cat(z)
            logits = both @ both.T / NT_XENT
            logits = logits.masked_fill(
                torch.eye(len(both), dtype=torch.bool, device=both.device), -torch.inf
            )
            partner = torch.arange(len(both), device=both.device).roll(len(z[0]))
            loss = F.cross_entropy(logits, partner)
            return {"ce": loss.item()}, list(torch.autograd.grad(loss, z))
        q = self.q.detach().double().requires_grad_()
        rows = q.flatten(0, -2)
        keys = self.k.double().repeat(case.views, 1)
        targets = self.targets.repeat(case.views)
        total = torch.zeros_like(rows)
        for at in torch.arange(len(rows), device=q.device).split(max(1, BLOCK // max(1, case.size))):
            x = rows[at].detach().requires_grad_()
            logits, teacher = x @ queue.T, keys[at] @ queue.T
            if case.work in ("relation", "multi_crop"):
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
