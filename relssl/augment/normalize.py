"""Normalisation by channel."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Computes (image - mean) / std of images [B, 3, H, W] in [0, 1].

    Args:
        mean, std: statistics by channel, [3], which become buffers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        super().__init__()
        for name, values in ("mean", mean), ("std", std):
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32).clone().view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean).div_(self.std)
