"""Gaussian blur as torchvision's gaussian_blur computes it, with a width of its own for each image."""

import torch
from torch import Tensor

from relssl.augment.draw import constant, floats
from relssl.augment.resample import filter_both_sides, multiples


def kernel_size(side: int) -> int:
    """Returns a tenth of an image's side, rounded down and made odd by adding 1, but at least 3 (SimCLR)."""
    return max(3, side // 10 // 2 * 2 + 1)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blurs squares [B, S, 3, S], see `relssl.augment.resample`; the border is reflected.

    sigma: standard deviation in pixels, [B]; 0 changes nothing.
    """
    batch, side = images.shape[:2]
    near, exponents = _neighbours(side, images.device)
    # 1e-12 does not change a variance above 1e-4, and makes weights of exactly 0 and 1 of the variance 0.
    variance = torch.addcmul(floats((1e-12,), images.device), sigma, sigma)
    weights = (exponents / variance.unsqueeze(1)).softmax(1)
    weights = weights.unsqueeze(1).expand(-1, side, -1).contiguous().expand(2, -1, -1, -1)
    rows = (near + multiples(batch, side, images.device).view(-1, 1, 1)).expand(2, -1, -1, -1)
    return filter_both_sides(images, rows, weights).transpose(1, 3)


@constant
def _neighbours(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the rows under the kernel at each row, int32 [S, K], and its exponents for sigma 1, [K]."""
    size = kernel_size(side)
    distance = torch.arange(size, device=device) - size // 2
    rows = (torch.arange(side, device=device).unsqueeze(1) + distance).abs()
    rows = (side - 1) - ((side - 1) - rows).abs()
    return rows.clamp(min=0).int(), distance.square().float() / -2
