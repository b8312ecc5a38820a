"""Weighted sums of rows, which separable filters consist of.

Within a view, images are float32 [B, W, 3, H] in levels from 0 to 255. With both sides exchanged, a filter
along the first side is a weighted sum of few contiguous rows. Neither autocast nor TF32 rounds these sums, as
they would round a matrix product or a convolution.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from relssl.augment.draw import constant


@constant
def multiples(count: int, step: int, device: torch.device) -> Tensor:
    """Returns 0, step, 2 step and so on, int32 [count]."""
    return torch.arange(0, count * step, step, dtype=torch.int32, device=device)


def filter_both_sides(images: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Replaces each side of images by M weighted sums of K rows.

    Args:
        images: float32 [B, H, 3, W].
        rows: which rows each result is a sum of, first for H and then for W, counted from the first image's;
            int32 [2, B, M, K].
        weights: float32 [2, B, M, K].

    Returns:
        float32 [B, M of W, 3, M of H].
    """
    _, batch, results, taps = rows.shape
    starts = multiples(batch * results, taps, images.device)

    def sums(images: Tensor, side: int) -> Tensor:
        table = images.flatten(0, 1).flatten(1)
        weight = weights[side].flatten()
        table = F.embedding_bag(rows[side].flatten(), table, starts, mode="sum", per_sample_weights=weight)
        return table.view(batch, results, *images.shape[2:])

    return sums(sums(images, 0).transpose(1, 3).contiguous(), 1)
