"""The losses in float64, written from the papers' formulas with torch's own building blocks.

Nothing here is shared with the package: softmax, kl_div and cross_entropy do the work, autograd the
gradients. `budget` is the error a backend may make.
"""

import torch
from torch.nn import functional as F


def double(*tensors):
    return [t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in tensors]


def relation(q, k, queue, tau_s, tau_t, form):
    """KL(p_t || p_s) or cross-entropy H(p_t, p_s), [B] or [V, B]; and H(p_t), [B]."""
    student, teacher = (q @ queue.mT) / tau_s, (k @ queue.mT) / tau_t
    p_t = F.softmax(teacher, -1)
    if form == "kl":
        target = F.log_softmax(teacher, -1).expand_as(student)
        loss = F.kl_div(F.log_softmax(student, -1), target, reduction="none", log_target=True).sum(-1)
    else:
        probabilities = p_t.expand_as(student).flatten(0, -2)
        loss = F.cross_entropy(student.flatten(0, -2), probabilities, reduction="none").view(student.shape[:-1])
    return loss, torch.special.entr(p_t).sum(-1)


def info_nce(q, k, queue, tau):
    """Cross-entropy of [positive, negatives] / tau with class 0, as MoCo's code has it."""
    positive = (q * k).sum(-1, keepdim=True)
    logits = torch.cat((positive, q @ queue.mT), -1) / tau
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


def logsumexp(x, queue, tau, exclude=None):
    """Row by row over the queue rows that are left."""
    lse, mean = [], []
    for r, row in enumerate(x):
        own = -1 if exclude is None else int(exclude[r])
        bank = torch.cat((queue[:own], queue[own + 1 :])) if own >= 0 else queue
        logits = bank @ row / tau
        lse.append(torch.logsumexp(logits, 0) if len(bank) else row.new_full((), -torch.inf))
        mean.append(F.softmax(logits, 0) @ bank if len(bank) else torch.zeros_like(row))
    return torch.stack(lse), torch.stack(mean)


FLOOR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def check(name, got, exact, eager, scale, dtype):
    """Fail unless |got - exact| <= 2 |eager - exact| + floor * max(|exact|, scale), in norm."""
    got, eager = got.detach().double(), eager.detach().double()
    assert torch.isfinite(got).all(), f"{name}: {got} is not finite"
    error, allowed = (got - exact).norm(), 2 * (eager - exact).norm()
    bound = allowed + FLOOR[dtype] * max(float(exact.norm()), float(scale))
    assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}, of {exact.norm():.2e}"
