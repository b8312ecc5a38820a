"""Eager PyTorch, straight from the formulas: the yardstick of correctness, in any dtype.

Plain differentiable torch that stores the similarity matrix. It serves what kernels do not: torch.func
transforms, forward-mode and higher-order derivatives. 16-bit input is computed in float32.
"""

import torch
from torch import Tensor

from relssl.backends.base import Backend
from relssl.backends.common import Scale, Temperature, accumulator, straight_through_round, without_autocast


class Reference(Backend):
    """Eager PyTorch, straight from the formulas: the yardstick of correctness, in any dtype."""

    def supports(self, device: str, dtype: torch.dtype, dim: int) -> None:
        return None

    def lse_and_mean(
        self, x: Tensor, queue: Tensor, scale: Scale, num_first: int, exclude: Tensor | None, want_mean: bool
    ) -> tuple[Tensor, Tensor]:
        rows, dtype = torch.arange(len(x), device=x.device), accumulator(x.dtype)
        # As tensors: of two numbers torch.where would make float32, also for float64 rows.
        first, second = (torch.as_tensor(scale[i], dtype=dtype, device=x.device) for i in (0, 1))
        scales = torch.where(rows < num_first, first, second)
        lse, mean = logsumexp(x.to(dtype) * scales[:, None], queue, 1.0, exclude, x.dtype)
        return torch.stack((lse, torch.zeros_like(lse))), mean if want_mean else mean[:, :0]


def nan_if_invalid(temperature: Temperature) -> Temperature:
    """Returns the temperature, as NaN if it is a tensor with a bad value: a check would synchronise."""
    if not isinstance(temperature, Tensor):
        return temperature
    return temperature.where((temperature > 0) & temperature.isfinite(), torch.nan)


@without_autocast
def logsumexp(
    x: Tensor, queue: Tensor, temperature: Temperature, exclude: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns lse [R] = log sum_j exp(<x, m_j>/tau) and mean [R, D] = sum_j softmax_j m_j, in one dtype."""
    x, queue = (straight_through_round(t, dtype) for t in (x, queue))
    logits = x @ queue.T / nan_if_invalid(temperature)
    if exclude is None:
        return logits.logsumexp(1), logits.softmax(1) @ queue
    logits = logits.masked_fill(torch.arange(len(queue), device=x.device) == exclude[:, None], -torch.inf)
    if len(queue) > 1:
        return logits.logsumexp(1), logits.softmax(1) @ queue
    empty = exclude == 0  # Softmax of nothing is NaN, and so would its gradient be.
    logits = logits.masked_fill(empty[:, None], 0)
    lse = logits.logsumexp(1).masked_fill(empty, -torch.inf)
    return lse, (logits.softmax(1) @ queue).masked_fill(empty[:, None], 0)


@without_autocast
def relation(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    student_temperature: Temperature,
    teacher_temperature: Temperature,
    form: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns ReSSL's relation loss ([B] or [V, B]) and the teacher's entropy [B]."""
    q, k, queue = (straight_through_round(t, dtype) for t in (q, k, queue))
    log_p_s = (q @ queue.T / nan_if_invalid(student_temperature)).log_softmax(-1)
    log_p_t = (k @ queue.T / nan_if_invalid(teacher_temperature)).log_softmax(-1)
    p_t = log_p_t.exp()
    entropy = -(p_t * log_p_t).sum(-1)
    if form == "ce":
        return -(p_t * log_p_s).sum(-1), entropy
    return (p_t * (log_p_t - log_p_s)).sum(-1), entropy


@without_autocast
def nt_xent(
    z1: Tensor, z2: Tensor, queue: Tensor | None, temperature: Temperature, dtype: torch.dtype
) -> Tensor:
    """Returns NT-Xent [2N] of two views [N, D], with further negatives from a queue unless it is None."""
    z = torch.cat([straight_through_round(t, dtype) for t in (z1, z2)])
    tau = nan_if_invalid(temperature)
    logits = (z @ z.T / tau).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    if queue is not None:
        logits = torch.cat((logits, z @ straight_through_round(queue, dtype).T / tau), 1)
    return logits.logsumexp(1) - (z * z.roll(len(z1), 0)).sum(1) / tau


@without_autocast
def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: Temperature, dtype: torch.dtype) -> Tensor:
    """Returns InfoNCE with positive k and negatives queue ([B] or [V, B])."""
    q, k, queue = (straight_through_round(t, dtype) for t in (q, k, queue))
    positive = (q * k).sum(-1, keepdim=True)
    positive = positive + 0 * positive  # An infinite one becomes NaN, and with it the loss.
    logits = torch.cat((positive, q @ queue.T), -1) / nan_if_invalid(temperature)
    return -logits.log_softmax(-1)[..., 0]
