"""The losses, written from the papers' formulas with torch's own functions, and the error budget.

Nothing here is shared with the package: it uses softmax, kl_div, cross_entropy and autograd.
In float64 these are the oracle; in a test's own dtype they are the eager code whose
error sets the budget that a backend has (`check`). `agree` compares outputs and all gradients with both.
"""

from math import log

import torch
from torch.nn import functional as F

FLOOR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def unit(*shape, dtype=torch.float32, norm=1.0):
    """Returns random rows of one norm."""
    wide = torch.promote_types(dtype, torch.float32)
    return (F.normalize(torch.randn(*shape, dtype=wide), dim=-1) * norm).to(dtype)


def is_float(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


# ---------------------------------------------------------------------------------- the formulas
#
# `left` lists for each row the queue rows that are not left out, as `left_of` finds them; None: all.


def left_of(size, ids=None, queue_ids=None, exclude=None, filled=None):
    used = range(size if filled is None else filled)
    if exclude is not None:
        return [[j for j in used if j != i] for i in exclude.tolist()]
    of_queue = queue_ids.tolist()
    return [[j for j in used if i < 0 or of_queue[j] != i] for i in ids.tolist()]


def relation(q, k, queue, tau_s, tau_t, form, left=None):
    """Returns KL(p_t || p_s) or cross-entropy H(p_t, p_s), [B] or [V, B]; and H(p_t), [B]."""
    if left is not None:
        rows = [
            relation(q[..., b : b + 1, :], k[b : b + 1], queue[rest], tau_s, tau_t, form)
            if rest
            else (q[..., b : b + 1, 0] * 0, k[b : b + 1, 0] * 0)
            for b, rest in enumerate(left)
        ]
        return tuple(torch.cat(parts, -1) for parts in zip(*rows, strict=True))
    student, teacher = (q @ queue.mT) / tau_s, (k @ queue.mT) / tau_t
    p_t = F.softmax(teacher, -1)
    if form == "kl":
        target = F.log_softmax(teacher, -1).expand_as(student)
        loss = F.kl_div(F.log_softmax(student, -1), target, reduction="none", log_target=True)
        loss = loss.sum(-1)
    else:
        probabilities = p_t.expand_as(student).flatten(0, -2)
        loss = F.cross_entropy(student.flatten(0, -2), probabilities, reduction="none")
        loss = loss.view(student.shape[:-1])
    return loss, torch.special.entr(p_t).sum(-1)


def info_nce(q, k, queue, tau, left=None):
    """Returns the cross-entropy of [positive, negatives] / tau with class 0, as in MoCo's code."""
    if left is not None:
        rows = [info_nce(q[..., b : b + 1, :], k[b : b + 1], queue[j], tau) for b, j in enumerate(left)]
        return torch.cat(rows, -1)
    positive = (q * k).sum(-1, keepdim=True)
    logits = torch.cat((positive, q @ queue.mT), -1) / tau
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return loss.view(labels.shape)


def nt_xent(z1, z2, queue, tau, left=None):
    """Returns [2N]: the cross-entropy of each row's other view, among all rows but itself and the queue's."""
    z = torch.cat((z1, z2))
    if left is not None:
        return torch.cat(
            [_nt_xent_of(i, z, torch.cat((z, queue[j])), tau) for i, j in enumerate(left + left)]
        )
    logits = (z @ z.mT / tau).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    if queue is not None:
        logits = torch.cat((logits, z @ queue.mT / tau), -1)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)), reduction="none")


def _nt_xent_of(i, z, others, tau):
    without_itself = torch.cat((others[:i], others[i + 1 :]))
    other_view = (i + len(z) // 2) % len(z)
    label = torch.tensor([other_view - (other_view > i)])
    return F.cross_entropy(z[i : i + 1] @ without_itself.mT / tau, label, reduction="none")


def clusters(p1, p2, tau, penalize):
    """Returns the mean NT-Xent of the columns' cosines, with log M less the entropy of each view's shares."""
    columns = [F.normalize(p, dim=0, eps=0).mT for p in (p1, p2)]
    loss = nt_xent(*columns, None, tau).mean()
    for p in (p1, p2) if penalize else ():
        loss = loss + log(p.shape[1]) - torch.special.entr(p.sum(0) / p.sum()).sum()
    return loss


def logsumexp(x, queue, tau, left=None):
    """Returns lse [R] and mean [R, D]."""
    if left is not None:
        empty = x.new_full((1,), -torch.inf), x[:1] * 0
        rows = [logsumexp(x[b : b + 1], queue[j], tau) if j else empty for b, j in enumerate(left)]
        return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
    logits = x @ queue.mT / tau
    return torch.logsumexp(logits, -1), F.softmax(logits, -1) @ queue


# ------------------------------------------------------------------------------------ the budget


def check(name, got, exact, eager, scale, floor):
    """Fails unless |got - exact| <= 2 |eager - exact| + floor * max(|exact|, scale), in norm.

    Where eager code overflows, its error counts as zero.
    """
    got, eager = got.detach().double().cpu(), eager.detach().double()
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert torch.isfinite(got).all(), f"{name}: {got} is not finite"
    error, allowed = (got - exact).norm(), 2 * (eager - exact).norm().nan_to_num(0, posinf=0)
    bound = allowed + floor * max(float(exact.norm()), float(scale))
    assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}, of {exact.norm():.2e}"


def evaluate(run, inputs, cotangents):
    """Returns the outputs of run(**inputs) and, by name, the gradients of the floating-point tensors."""
    inputs = {name: t.detach().requires_grad_() if is_float(t) else t for name, t in inputs.items()}
    outputs = run(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [g.to(out) for g, out in zip(cotangents, outputs, strict=True)]
    torch.autograd.backward(outputs, grads)
    leaves = {n: t for n, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    return outputs, {name: t.grad for name, t in leaves.items()}


def _zero_if_unused(grad, like):
    return torch.zeros_like(like) if grad is None else grad


def cotangents_like(*shapes):
    """Returns random weights that every dtype represents exactly."""
    return [torch.randn(shape).bfloat16().double() for shape in shapes]


def agree(ours, formula, inputs, cotangents, scales, dtype, logit, drawn=False):
    """Compares ours(**inputs) with formula(**inputs): outputs and the gradient of every tensor.

    `scales` has the size below which an error does not count: one entry per output ("0", "1") and
    one per input. For a gradient it is (largest slope) * |cotangent|.

    The floor is FLOOR. For `drawn` inputs it is at least an ulp of the largest `logit`, the error
    of code that rounds its logits: eager code is sometimes exact by chance, with few rows or round
    numbers. The same holds for float64, where the oracle is no more precise than the code.
    """
    limited = drawn or dtype == torch.float64
    ulp = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * logit
    floor = max(FLOOR[dtype], ulp) if limited else FLOOR[dtype]
    values = {n: t.cpu() if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    values = {n: t.to(dtype) if is_float(t) and t.dim() else t for n, t in values.items()}
    precise = {n: t.double() if is_float(t) else t for n, t in values.items()}
    exact, exact_grads = evaluate(formula, precise, cotangents)
    eager, eager_grads = evaluate(formula, values, cotangents)
    got, grads = evaluate(ours, inputs, cotangents)
    for i, out in enumerate(got):
        check(f"output {i}", out, exact[i].detach(), eager[i], scales[str(i)], floor)
    for name, grad in grads.items():
        assert grad is not None, f"no gradient for {name}"
        assert grad.dtype == inputs[name].dtype, f"gradient of {name} is {grad.dtype}"
        expected = (_zero_if_unused(g[name], precise[name]) for g in (exact_grads, eager_grads))
        check(f"grad {name}", grad, *expected, scales[name], floor)


def largest_logit(*sides, queue):
    """Returns a bound on <x, m> / tau; sides are (x, tau)."""
    return max(_widest(x) / float(tau) for x, tau in sides) * _widest(queue)


def _widest(t):
    """Returns the largest row norm."""
    return float(t.detach().double().norm(dim=-1).max())


# The logarithm of a float32 sum near 1 errs by half an ulp of 1, 6e-8, however small the logits are.
LEAST = 1e-7 / FLOOR[torch.bfloat16]


def relation_scales(q, k, queue, tau_s, tau_t, g, ones):
    """The loss has the size of the log-probabilities that it is a sum of."""
    c_s, c_t, m, w = 1 / float(tau_s), 1 / float(tau_t), _widest(queue), float(g.norm())
    theta_s, theta_t = c_s * _widest(q), c_t * _widest(k)
    return {
        "0": ((theta_s + theta_t) * m + log(len(queue)) + LEAST) * ones,
        "q": c_s * m * w,
        "k": c_t * m * w,
        "queue": (theta_s + theta_t) * w,
        "tau_s": c_s * theta_s * m * w,
        "tau_t": c_t * theta_t * m * w,
    }


def info_nce_scales(q, k, queue, tau, g, ones):
    c, w = 1 / float(tau), float(g.norm())
    m = max(_widest(queue), _widest(k))
    theta = c * _widest(q)
    return {
        "0": (theta * m + log(len(queue) + 1) + LEAST) * ones,
        "q": c * m * w,
        "k": theta * w,
        "queue": theta * w,
        "tau": c * theta * m * w,
    }


def nt_xent_scales(z1, z2, queue, tau, g, ones):
    """Each row is an anchor and a negative: its gradient has twice the slope, as the temperature's has."""
    c, w = 1 / float(tau), 2 * float(g.norm())
    z = max(_widest(z1), _widest(z2))
    m, size = (z, 0) if queue is None else (max(z, _widest(queue)), len(queue))
    return {
        "0": (c * z * m + log(2 * len(z1) + size) + LEAST) * ones,
        "z1": c * m * w,
        "z2": c * m * w,
        "queue": c * z * w,
        "tau": c * c * z * m * w,
    }


def cluster_scales(p1, p2, tau, penalize, g):
    """NT-Xent's of unit rows, over the columns' lengths; and that of the logarithms of the shares."""
    scales = nt_xent_scales(torch.ones(1, 1), torch.ones(1, 1), None, tau, g, 1)
    for name, p in (("p1", p1.detach().double()), ("p2", p2.detach().double())):
        scales[name] = scales["z1"] / float(p.norm(dim=0).min())
        if penalize:
            scales["0"] += log(p.shape[1])
            scales[name] += float(g.abs() * (p.sum(0) / p.sum()).log().norm() * len(p) ** 0.5 / p.sum())
    scales["0"] += log(p1.shape[1])
    return scales


def logsumexp_scales(x, queue, tau, g_lse, g_mean):
    c, m, rows = 1 / float(tau), _widest(queue), len(x) ** 0.5
    theta = c * _widest(x)
    w = float(g_lse.norm()) + m * float(g_mean.norm())
    return {
        "0": (theta * m + log(len(queue)) + LEAST) * rows,
        "1": m * rows,
        "x": c * m * w,
        "queue": theta * w + float(g_mean.norm()),
        "tau": c * theta * m * w,
    }
