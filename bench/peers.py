"""The relation loss, forward and backward, as it can be had today; and by relssl.

Each peer is a function of (q, k, queue) that gives a scalar loss, of which only q wants a gradient: the
cross-entropy form that ReSSL's published code has, at its temperatures.
"""

import os
from collections.abc import Callable

import eager
import torch
from torch import Tensor

from relssl import backends
from relssl.functional import relation_loss

STUDENT, TEACHER = 0.1, 0.04
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Attention(torch.autograd.Function):
    """torch's own flash attention with keys = values = queue, which also gives the log-sum-exp.

    What is left is the epilogue that relssl has, gradient in forward included: the strongest a user could
    put together from parts, given the idea. On a GPU a queue in one piece keeps as many processors busy as
    there are blocks of rows; in `splits` pieces, as heads whose results are merged, all.
    """

    @staticmethod
    def forward(ctx, q, k, queue, splits):
        bank = queue.view(1, splits, -1, queue.shape[1])

        def attend(x, tau):
            rows = x.expand(1, splits, *x.shape)
            if queue.is_cuda:
                mean, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                    rows, bank, bank, scale=1 / tau
                )
            else:
                flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                mean, lse = flash(rows, bank, bank, scale=1 / tau)
            if splits == 1:
                return mean[0, 0].float(), lse.view(-1).float()
            whole = lse[0].logsumexp(0)
            return torch.einsum("sb,sbd->bd", (lse[0] - whole).exp(), mean[0].float()), whole

        mean_s, lse_s = attend(q, STUDENT)
        mean_t, _ = attend(k, TEACHER)
        ctx.save_for_backward((mean_s - mean_t) / (STUDENT * len(q)))
        ctx.dtype = q.dtype
        return (lse_s - (q.float() * mean_t).sum(1) / STUDENT).mean()

    @staticmethod
    def backward(ctx, g):
        return (g * ctx.saved_tensors[0]).to(ctx.dtype), None, None, None


def attention(splits: int = 1) -> Loss:
    return lambda q, k, queue: _Attention.apply(q, k, queue, splits)


def published(q: Tensor, k: Tensor, columns: Tensor) -> Tensor:
    return eager.relation_loss(q, k, columns, STUDENT, TEACHER)


def relssl(backend: str, kernel: str = "") -> Loss:
    def loss(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        os.environ["RELSSL_CUDA_KERNEL"] = kernel
        return relation_loss(q, k, queue, form="ce", backend=backend)

    return loss


def peers(queue: Tensor, rows: int, tuned: bool = False) -> dict[str, Loss]:
    """Name -> loss(q, k, queue). The published code keeps its queue as columns [D, K]: here they are."""
    columns = queue.T.contiguous()
    mode = "max-autotune-no-cudagraphs" if tuned else None
    compiled = torch.compile(published, dynamic=False, mode=mode)
    losses: dict[str, Loss] = {
        "eager": lambda q, k, _: published(q, k, columns),
        "torch.compile": lambda q, k, _: compiled(q, k, columns),
        "chunked": relssl("chunked"),
    }
    if not queue.is_cuda:
        return losses | {"attention": attention(), "cpu": relssl("cpu")}
    if queue.shape[1] <= 256 and queue.dtype != torch.float32:  # what the flash kernel takes
        processors = torch.cuda.get_device_properties(queue.device).multi_processor_count
        splits = 1  # of equal size, so that blocks of 128 rows fill the chip
        while splits * -(-rows // 128) < processors and queue.shape[0] % (2 * splits) == 0:
            splits *= 2
        losses |= {"attention": attention(), f"attention in {splits}": attention(splits)}
    losses["triton"] = relssl("triton")
    if backends.MODULES["cuda"].supports("cuda", queue.dtype, queue.shape[1]) is None:
        losses["cuda"] = relssl("cuda")
        if torch.cuda.get_device_capability() == (9, 0):
            losses["cuda sm_90a"] = relssl("cuda", "sm_90a")
    return losses
