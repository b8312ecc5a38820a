"""BatchNorm in parts of the batch: `SplitBatchNorm2d`, and the two ops that it consists of.

    relssl::split_batch_norm           y, and the statistics of each part
    relssl::split_batch_norm_backward  the gradients of x, weight and bias

Both keep the memory format of x. On a GPU each is two launches of Triton (kernels/batch_norm.py); elsewhere
torch's own BatchNorm runs on one part after the other, which takes a CPU little longer than the whole batch.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from relssl import backends, ops
from relssl.backends import launching
from relssl.backends.common import device_type


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics are computed separately over `splits` parts of the batch.

    Part s consists of the s-th batch / splits images. One GPU then behaves like `splits` GPUs without
    synchronised BatchNorm: the running statistics move by the mean of the parts' updates. With the teacher's
    batch shuffled, the statistics do not reveal which key belongs to which query (MoCo, He et al. 2020).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, features: int, splits: int, **options: Any) -> None:
        super().__init__(features, **options)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.splits == 1:
            return super().forward(x)
        batch, _, *size = x.shape
        if batch % self.splits:
            raise ValueError(f"a batch of {batch} does not divide into {self.splits} BatchNorm splits")
        if batch // self.splits * prod(size) < 2:
            raise ValueError(f"BatchNorm needs two values per channel in each part, got {list(x.shape)}")
        y, stats, _ = _SplitBatchNorm.apply(x, self.weight, self.bias, self.splits, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                running = [self.running_mean, self.running_var]
                torch._foreach_lerp_(running, list(stats.mean(1)), self.momentum)
                self.num_batches_tracked.add_(1)
        return y


class _SplitBatchNorm(torch.autograd.Function):
    """The ops with their gradient; the statistics have none."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, splits: int, eps: float) -> tuple[Tensor, ...]:
        return _forward(x, weight, bias, splits, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, _, ctx.eps = inputs
        _, stats, rstd = output
        ctx.save_for_backward(x, weight, stats, rstd)
        ctx.mark_non_differentiable(stats, rstd)
        ctx.set_materialize_grads(False)  # Zeros for the statistics would be two launches.

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        return *_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, splits: int, eps: float) -> tuple[Tensor, ...]:
    stats = weight.new_empty(2, splits, len(weight))
    return torch.empty_like(x), stats, torch.empty_like(stats[0])


@ops.op(
    "split_batch_norm(Tensor x, Tensor weight, Tensor bias, SymInt splits, float eps)"
    " -> (Tensor y, Tensor stats, Tensor rstd)",
    _forward_fake,
)
def _forward(x: Tensor, weight: Tensor, bias: Tensor, splits: int, eps: float) -> tuple[Tensor, ...]:
    """Returns y, and of each part mean and unbiased variance [2, splits, C], and 1 / sqrt(var + eps)."""
    y, stats, rstd = _forward_fake(x, weight, bias, splits, eps)
    if _triton_supports(x):
        _forward_by_triton(x, weight, bias, eps, y, stats, rstd)
        return y, stats, rstd
    stats.zero_()
    mean = torch.empty_like(rstd)
    each = zip(x.chunk(splits), y.chunk(splits), *stats, mean, rstd, strict=True)
    for part, out, part_mean, part_var, save_mean, save_invstd in each:
        # With a momentum of 1 the "running" statistics are those of the part.
        torch.ops.aten.native_batch_norm.out(
            part, weight, bias, part_mean, part_var, True, 1.0, eps,
            out=out, save_mean=save_mean, save_invstd=save_invstd,
        )  # fmt: skip
    return y, stats, rstd


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@ops.op(
    "split_batch_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor stats, Tensor rstd, float eps)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _backward_fake,
)
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, ...]:
    grads = _backward_fake(grad, x, weight, stats, rstd, eps)
    if _triton_supports(x):
        _backward_by_triton(grad, x, weight, stats, rstd, grads)
        return grads
    splits = len(rstd)
    parts = [
        torch.ops.aten.native_batch_norm_backward(g, part, weight, None, None, *saved, True, eps, [True] * 3)
        for g, part, *saved in zip(grad.chunk(splits), x.chunk(splits), stats[0], rstd, strict=True)
    ]
    grad_x, grad_weight, grad_bias = zip(*parts, strict=True)
    torch.cat(grad_x, out=grads[0])
    return grads[0], torch.stack(grad_weight).sum(0), torch.stack(grad_bias).sum(0)


def _triton_supports(x: Tensor) -> bool:
    return backends.BACKENDS["triton"].supports(device_type(x), x.dtype, 1) is None


def _forward_by_triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, y: Tensor, stats: Tensor, rstd: Tensor
) -> None:
    x, out = _channels_last(x), _channels_last(y)
    with launching.device_guard(x):
        plan = launching.cached_launch(
            _plan, x.get_device(), ("moments", "normalize"), len(rstd), x, weight, bias
        )
        (moments, normalize), sizes, partials = plan[:2], plan[2], stats.new_empty(plan[3], dtype=torch.float)
        moments(x, partials, *sizes)
        normalize(x, weight, bias, partials, out, stats, rstd, *sizes, eps)
    if out is not y:
        y.copy_(out)


def _backward_by_triton(
    grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, rstd: Tensor, grads: tuple[Tensor, ...]
) -> None:
    x, grad, out = map(_channels_last, (x, grad, grads[0]))
    with launching.device_guard(x):
        plan = launching.cached_launch(
            _plan, x.get_device(), ("sums", "backward"), len(rstd), x, grad, weight
        )
        (sums, backward), sizes, partials = plan[:2], plan[2], stats.new_empty(plan[3], dtype=torch.float)
        sums(x, grad, stats, partials, *sizes)
        backward(x, grad, weight, stats, rstd, partials, out, *grads[1:], *sizes)
    if out is not grads[0]:
        grads[0].copy_(out)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _plan(device: int, names: tuple[str, str], splits: int, x: Tensor, *_: Tensor) -> tuple[Any, ...]:
    """Returns the launches of both kernels, the numbers that they take, and the shape of partials."""
    kernels, channels = launching.kernels().batch_norm, x.shape[1]
    size = x.numel() // (splits * channels)
    rows, constants = kernels.chunks(splits, size, channels, launching.chip(device).processors)
    grid = -(-channels // constants["BLOCK_C"]), -(-size // rows), splits
    launches = [launching.Launch(getattr(kernels, name), grid, constants, num_warps=4) for name in names]
    return *launches, (size, channels, rows), (2, splits, constants["CHUNKS"], channels)
