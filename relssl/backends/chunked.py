"""The queue in tiles of torch.mm and torch.softmax: the fallback of every device."""

import torch
from torch import Tensor

from relssl.backends import tiles
from relssl.backends.base import Backend
from relssl.backends.common import Scale, accumulator


class Chunked(Backend):
    """Tiles of the queue through torch.mm and torch.softmax: exact, any device, O(R·D) memory."""

    def supports(self, device: str, dtype: torch.dtype, dim: int) -> None:
        return None

    def lse_and_mean(
        self,
        x: Tensor,
        queue: Tensor,
        scale: Scale,
        num_first: int,
        exclude: Tensor | None,
        want_mean: bool,
    ) -> tuple[Tensor, Tensor]:
        theta = x.to(accumulator(x.dtype), copy=True)
        theta[:num_first].mul_(scale[0])
        theta[num_first:].mul_(scale[1])
        return tiles.lse_and_mean(theta, queue, exclude, want_mean)
