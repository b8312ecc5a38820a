"""Eager PyTorch, straight from the formulas: the yardstick of correctness, in any dtype.

Plain differentiable torch that stores the similarity matrix. It serves what kernels do not: torch.func
transforms, forward-mode and higher-order derivatives. 16-bit input is computed in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from relssl.backends.base import Backend
from relssl.backends.common import (
    Exclude,
    Scale,
    Temperature,
    accumulator,
    straight_through_round,
    without_autocast,
)


class Reference(Backend):
    """Eager PyTorch, straight from the formulas: the yardstick of correctness, in any dtype."""

    def supports(self, device: str, dtype: torch.dtype, dim: int) -> None:
        return None

    def lse_and_mean(
        self, x: Tensor, queue: Tensor, scale: Scale, num_first: int, exclude: Exclude | None, want_mean: bool
    ) -> tuple[Tensor, Tensor]:
        rows, dtype = torch.arange(len(x), device=x.device), accumulator(x.dtype)
        # As tensors: of two numbers torch.where would make float32, also for float64 rows.
        first, second = (torch.as_tensor(scale[i], dtype=dtype, device=x.device) for i in (0, 1))
        scales = torch.where(rows < num_first, first, second)
        lse, mean = logsumexp(x.to(dtype) * scales[:, None], queue, 1.0, x.dtype, exclude or ())
        return torch.stack((lse, torch.zeros_like(lse))), mean if want_mean else mean[:, :0]


def nan_if_invalid(temperature: Temperature) -> Temperature:
    """Returns the temperature, as NaN if it is a tensor with a bad value: a check would synchronise."""
    if not isinstance(temperature, Tensor):
        return temperature
    return temperature.where((temperature > 0) & temperature.isfinite(), torch.nan)


@without_autocast
def logsumexp(
    x: Tensor,
    queue: Tensor,
    temperature: Temperature,
    dtype: torch.dtype,
    exclude: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor]:
    """Returns lse [R] = log sum_j exp(<x, m_j>/tau) and mean [R, D] = sum_j softmax_j m_j, in one dtype."""
    x, queue = straight_through_round(x, dtype), _used(queue, dtype, exclude)
    logits = x @ queue.T / nan_if_invalid(temperature)
    if not exclude:
        return logits.logsumexp(1), logits.softmax(1) @ queue
    out = Exclude(*exclude).mask(queue)
    empty = out.all(1, keepdim=True)  # A softmax of nothing would be NaN, and so would its gradient.
    logits = logits.masked_fill(out & ~empty, -torch.inf)
    lse = logits.logsumexp(1).masked_fill(empty[:, 0], -torch.inf)
    return lse, (logits.softmax(1) @ queue).masked_fill(empty, 0)


@without_autocast
def relation(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    student_temperature: Temperature,
    teacher_temperature: Temperature,
    form: str,
    dtype: torch.dtype,
    exclude: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor]:
    """Returns ReSSL's relation loss ([B] or [V, B]) and the teacher's entropy [B]."""
    q, k = straight_through_round(q, dtype), straight_through_round(k, dtype)
    queue = _used(queue, dtype, exclude)
    student = q @ queue.T / nan_if_invalid(student_temperature)
    teacher = k @ queue.T / nan_if_invalid(teacher_temperature)
    if not exclude:
        log_p_s, log_p_t = student.log_softmax(-1), teacher.log_softmax(-1)
        p_t = log_p_t.exp()
    else:  # Where p_t is 0 for what is excluded, any finite log_p will do.
        out = Exclude(*exclude).mask(queue)
        hidden = out & ~out.all(1, keepdim=True)  # Not all: a softmax of nothing would be NaN.
        log_p_s, log_p_t = (
            logits.masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(out, 0)
            for logits in (student, teacher)
        )
        p_t = log_p_t.exp().masked_fill(out, 0)
    entropy = -(p_t * log_p_t).sum(-1)
    if form == "ce":
        return -(p_t * log_p_s).sum(-1), entropy
    return (p_t * (log_p_t - log_p_s)).sum(-1), entropy


@without_autocast
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    queue: Tensor | None,
    temperature: Temperature,
    dtype: torch.dtype,
    exclude: Sequence[Tensor | None] = (),
) -> Tensor:
    """Returns NT-Xent [2N] of two views [N, D], with further negatives from a queue unless it is None."""
    z = torch.cat([straight_through_round(t, dtype) for t in (z1, z2)])
    tau = nan_if_invalid(temperature)
    logits = (z @ z.T / tau).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    if queue is not None:
        negatives = _negatives(z.view(2, *z1.shape), _used(queue, dtype, exclude), tau, exclude)
        logits = torch.cat((logits, negatives.flatten(0, 1)), 1)
    return logits.logsumexp(1) - (z * z.roll(len(z1), 0)).sum(1) / tau


@without_autocast
def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: Temperature,
    dtype: torch.dtype,
    exclude: Sequence[Tensor | None] = (),
) -> Tensor:
    """Returns InfoNCE with positive k and negatives queue ([B] or [V, B])."""
    q, k = straight_through_round(q, dtype), straight_through_round(k, dtype)
    queue = _used(queue, dtype, exclude)
    positive = (q * k).sum(-1, keepdim=True)
    positive = positive + 0 * positive  # An infinite one becomes NaN, and with it the loss.
    tau = nan_if_invalid(temperature)
    logits = torch.cat((positive / tau, _negatives(q, queue, tau, exclude)), -1)
    return -logits.log_softmax(-1)[..., 0]


def _used(queue: Tensor, dtype: torch.dtype, exclude: Sequence[Tensor | None]) -> Tensor:
    """Returns the queue rounded to dtype, with zeros for the rows not filled."""
    queue = straight_through_round(queue, dtype)
    unused = Exclude(*exclude).unused(0, len(queue)) if exclude else None
    return queue if unused is None else queue.masked_fill(unused[:, None], 0)  # 0 times NaN is NaN.


def _negatives(x: Tensor, queue: Tensor, tau: Temperature, exclude: Sequence[Tensor | None]) -> Tensor:
    """Returns the logits of x [..., B, D] with the queue, [..., B, K]; -inf for what B's rows exclude."""
    logits = x @ queue.T / tau
    return logits.masked_fill(Exclude(*exclude).mask(queue), -torch.inf) if exclude else logits
