"""The pieces of work that are timed: their inputs, what they come to in float64, and how many flop they need.

Everything is written from the formulas, row block by row block, and shares nothing with relssl.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

STUDENT, TEACHER = 0.1, 0.04  # ReSSL
INFO_NCE, NT_XENT = 0.2, 0.5  # MoCo v2; SimCLR, CC and SACC
BLOCK = 2**26 if torch.cuda.is_available() else 2**21  # similarities that the oracle holds at a time

TITLES = {
    "relation": "relation loss",
    "info_nce": "InfoNCE with a queue",
    "bank": "InfoNCE over a bank that holds the positives",
    "nt_xent": "NT-Xent",
    "multi_crop": "relation loss, multi-crop",
    "enqueue": "enqueueing",
    "ressl_step": "a training step of ReSSL",
    "sacc_step": "a training step of SACC",
}


@dataclass(frozen=True)
class Case:
    """A piece of work at one size. K is 0 for nt_xent, which has no queue; V > 1 for multi_crop alone."""

    work: str
    rows: int
    size: int
    dim: int
    dtype: str = "float32"
    grad: bool = True
    views: int = 1

    @property
    def title(self) -> str:
        kind = ", forward + backward" if self.grad else ", forward"
        return TITLES[self.work] + (kind if self.work in UNITS else "")

    @property
    def shape(self) -> str:
        views = f"V {self.views}, " if self.views > 1 else ""
        size = f"K {self.size:,}, " if self.size else ""
        return f"{views}B {self.rows:,}, {size}D {self.dim}, {self.dtype}"

    def __str__(self) -> str:
        return f"{self.title}, {self.shape}"

    @property
    def pairs(self) -> int:
        """Similarities that there are, of one side."""
        return 4 * self.rows**2 if self.work == "nt_xent" else self.views * self.rows * self.size

    @property
    def flop(self) -> int:
        """The fewest that compute loss and gradient without keeping similarities; of products alone."""
        product = 2 * self.rows * (self.size or 4 * self.rows) * self.dim  # of one side's rows
        return product * UNITS[self.work](self)


# Matrix products: similarities, and the queue's means where there is a gradient.
UNITS: dict[str, Callable[[Case], int]] = {
    "relation": lambda case: 4 if case.grad else 2,
    "multi_crop": lambda case: (case.views + 1) * (2 if case.grad else 1),
    "info_nce": lambda case: 2 if case.grad else 1,
    "bank": lambda case: 2 if case.grad else 1,
    "nt_xent": lambda case: 3 if case.grad else 1,  # The sums, then again with (E / Z_i + E / Z_j) z_j.
}


class Problem:
    """A case's tensors on a device: unit-norm rows; `leaves` are those that want a gradient."""

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
        if case.work == "bank":  # As if k had been enqueued already.
            self.queue[: case.rows] = self.k
        self.targets = torch.arange(case.rows, device=device)

    @cached_property
    def columns(self) -> Tensor:
        """The queue as published code keeps it, [D, K]."""
        return self.queue.T.contiguous()

    @cached_property
    def exact(self) -> tuple[dict[str, float], list[Tensor]]:
        """In float64: the mean loss ("ce" and "kl" of the relation loss), and its gradient for each leaf."""
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
        """Of a mean loss and its gradients, the largest relative error, norms of gradients over all rows.

        tangential: of the gradient's parts across each row alone, since the loss normalises its rows itself.
        """
        losses, expected = self.exact
        worst = abs(loss.item() / losses[form] - 1)
        for x, ours, true in zip(self.leaves, grads, expected, strict=False):
            away, unit = ours.double() - true, x.detach().double()
            if tangential:
                away, true = (g - (g * unit).sum(-1, keepdim=True) * unit for g in (away, true))
            worst = max(worst, (away.norm() / true.norm()).item())
        return worst
