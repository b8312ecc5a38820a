"""The relation loss as training code has it today: plain PyTorch, with the steps of ReSSL's published code.

The queue lies as [D, K]; both products take a clone of it, since enqueueing writes into it in place.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def relation_loss(q: Tensor, k: Tensor, queue: Tensor, tau_s: float = 0.1, tau_t: float = 0.04) -> Tensor:
    """Mean cross-entropy of q [B, D] against k [B, D] over queue [D, K]."""
    logits_q = torch.mm(q, queue.clone().detach())
    logits_k = torch.mm(k, queue.clone().detach())
    target = F.softmax(logits_k.detach() / tau_t, dim=1)
    return -torch.sum(target * F.log_softmax(logits_q / tau_s, dim=1), dim=1).mean()
