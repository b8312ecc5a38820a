"""Eager PyTorch, straight from the formulas: the yardstick of correctness, in any dtype.

Plain differentiable torch that materialises the similarity matrix. It serves what kernels do not:
torch.func transforms, forward-mode and higher-order derivatives. 16-bit input is computed in float32.
"""

import torch
from torch import Tensor

from relssl.backends.common import Temperature, hold, without_autocast


def supports(device: str, dtype: torch.dtype, dim: int) -> None:
    """Anything goes."""


def valid(temperature: Temperature) -> Temperature:
    """A bad temperature on a device, where nobody looks, becomes NaN."""
    if not isinstance(temperature, Tensor):
        return temperature
    return temperature.where((temperature > 0) & temperature.isfinite(), torch.nan)


@without_autocast
def logsumexp(
    x: Tensor, queue: Tensor, temperature: Temperature, exclude: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """lse [R] = log sum_j exp(<x, m_j>/tau) and mean [R, D] = sum_j softmax_j m_j, in one dtype's values."""
    x, queue = (hold(t, dtype) for t in (x, queue))
    logits = x @ queue.T / valid(temperature)
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
    """ReSSL's relation loss ([B] or [V, B]) and the teacher's entropy [B]."""
    q, k, queue = (hold(t, dtype) for t in (q, k, queue))
    log_p_s = (q @ queue.T / valid(student_temperature)).log_softmax(-1)
    log_p_t = (k @ queue.T / valid(teacher_temperature)).log_softmax(-1)
    p_t = log_p_t.exp()
    entropy = -(p_t * log_p_t).sum(-1)
    if form == "ce":
        return -(p_t * log_p_s).sum(-1), entropy
    return (p_t * (log_p_t - log_p_s)).sum(-1), entropy


@without_autocast
def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: Temperature, dtype: torch.dtype) -> Tensor:
    """InfoNCE with positive k and negatives queue ([B] or [V, B])."""
    q, k, queue = (hold(t, dtype) for t in (q, k, queue))
    positive = (q * k).sum(-1, keepdim=True)
    positive = positive + 0 * positive  # An infinite one becomes NaN, and with it the loss.
    logits = torch.cat((positive, q @ queue.T), -1) / valid(temperature)
    return -logits.log_softmax(-1)[..., 0]
