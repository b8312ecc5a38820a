"""The relation loss, forward and backward, as it can be had today; and by relssl.

Each peer is a function of (q, k, queue) that gives a scalar loss, of which only q wants a gradient: the
cross-entropy form that ReSSL's published code has, at its temperatures.
"""

from collections.abc import Callable

import eager
import torch
from torch import Tensor

from relssl.functional import relation_loss

STUDENT, TEACHER = 0.1, 0.04
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Attention(torch.autograd.Function):
    """torch's own flash attention with keys = values = queue, which also gives the log-sum-exp.

    What is left is the epilogue that relssl has, gradient in forward included: the strongest a user could
    put together from parts, given the idea.
    """

    @staticmethod
    def forward(ctx, q, k, queue):
        def attend(x, tau):
            rows, bank = x[None, None], queue[None, None]
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            mean, lse = flash(rows, bank, bank, scale=1 / tau)
            return mean[0, 0].float(), lse.view(-1).float()

        mean_s, lse_s = attend(q, STUDENT)
        mean_t, _ = attend(k, TEACHER)
        ctx.save_for_backward((mean_s - mean_t) / (STUDENT * len(q)))
        ctx.dtype = q.dtype
        return (lse_s - (q.float() * mean_t).sum(1) / STUDENT).mean()

    @staticmethod
    def backward(ctx, g):
        return (g * ctx.saved_tensors[0]).to(ctx.dtype), None, None


def attention(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    return _Attention.apply(q, k, queue)


def published(q: Tensor, k: Tensor, columns: Tensor) -> Tensor:
    return eager.relation_loss(q, k, columns, STUDENT, TEACHER)


def relssl(backend: str) -> Loss:
    return lambda q, k, queue: relation_loss(q, k, queue, form="ce", backend=backend)


def peers(queue: Tensor) -> dict[str, Loss]:
    """Name -> loss(q, k, queue). The published code keeps its queue as columns [D, K]: here they are."""
    columns = queue.T.contiguous()
    compiled = torch.compile(published, dynamic=False)
    return {
        "eager": lambda q, k, _: published(q, k, columns),
        "torch.compile": lambda q, k, _: compiled(q, k, columns),
        "attention": attention,
        "chunked": relssl("chunked"),
        "cpu": relssl("cpu"),
    }
