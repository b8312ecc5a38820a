"""Random resized crops as torchvision's RandomResizedCrop draws and resamples them, with flips folded in."""

from math import ceil, log

import torch
from torch import Tensor

from relssl.augment.draw import Range, constant, floats
from relssl.augment.resample import filter_both_sides

CANDIDATES = 10  # after which torchvision falls back to the largest central box with an admissible ratio


@constant
def box_ranges(height: int, width: int, scale: Range, ratio: Range) -> tuple[tuple[Range, ...], ...]:
    """Returns the ranges of what `boxes` needs for an image: areas, half log ratios, and positions.

    The fallback is an eleventh candidate, whose ranges are empty.
    """
    fallback_width = min(width, round(height * ratio[1]))
    fallback_height = min(height, round(width / ratio[0]))
    area, half_log = fallback_height * fallback_width, log(fallback_width / fallback_height) / 2
    areas = [(scale[0] * height * width, scale[1] * height * width)] * CANDIDATES + [(area, area)]
    half_logs = [(log(ratio[0]) / 2, log(ratio[1]) / 2)] * CANDIDATES + [(half_log, half_log)]
    middle = 0.5 - 1e-4  # An odd margin is larger at the end.
    positions = [(0.0, 1.0)] * CANDIDATES + [(middle, middle)]
    return tuple(areas), tuple(half_logs), tuple(positions * 2)


def boxes(
    areas: Tensor, half_logs: Tensor, positions: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Selects each image's first candidate that fits into it.

    Args:
        areas, half_logs, positions: draws of `box_ranges`, [B, 11], [B, 11] and [B, 22].
        height, width: of the images.

    Returns:
        (top, left) and (height, width) of each box, float32 [B, 2] in whole pixels.
    """
    signs = floats((((-1.0,),), ((1.0,),)), areas.device)  # [2, 1, 1], of height and width.
    beyond = floats((((height + 1,),), ((width + 1,),)), areas.device)
    sizes = (areas.sqrt() * (half_logs * signs).exp_()).round_()  # [2, B, 11]
    fits = ((sizes >= 1) & (sizes < beyond)).all(0)
    first = fits.max(1, keepdim=True).indices.expand(2, -1, -1)
    size = sizes.gather(2, first)
    position = positions.unflatten(1, (2, -1)).transpose(0, 1).gather(2, first)
    start = (position * (beyond - size)).floor_()
    return start.squeeze(2).T, size.squeeze(2).T


def crop(images: Tensor, start: Tensor, size: Tensor, flip: Tensor, side: int) -> Tensor:
    """Resizes boxes to squares, bilinearly and with antialiasing.

    Args:
        images: uint8 [B, 3, H, W].
        start, size: see `boxes`.
        flip: 1 for the boxes to be mirrored horizontally and 0 for the others, [B].
        side: side S of the results in pixels.

    Returns:
        float32 [B, S, 3, S], see `relssl.augment.resample`.
    """
    height, width = images.shape[2:]
    device = images.device
    start, size = (t.T[:, :, None, None] for t in (start, size))  # [2, B, 1, 1], of height and width.
    centres, mirror = _centres(side, device)
    # Where the results lie in the box, in pixels whose centres are whole numbers: [2, B, S, 1].
    positions = torch.addcmul(centres, flip.view(-1, 1, 1), mirror)
    at = torch.addcmul(floats((-0.5,), device), size, positions)
    if side >= max(height, width):
        pixels, weights = _interpolate(at, size)
    else:
        pixels, weights = _antialias(at, size, side, ceil(2 * max(height, width) / side))
    # Floats are exact up to 16,777,216 rows of all images.
    first = torch.add(start, _first_rows(len(images), height, width, device))
    rows = (pixels + first).int()
    levels = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return filter_both_sides(levels, rows, weights)


@constant
def _centres(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the centres of pixels, from 0 to 1, and what mirroring adds to them, [2, 1, S, 1]."""
    centres = (torch.arange(side, dtype=torch.float32, device=device) + 0.5).div(side).view(1, 1, -1, 1)
    return centres.expand(2, -1, -1, -1), torch.cat((torch.zeros_like(centres), 1 - 2 * centres))


@constant
def _first_rows(batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """Returns the number of each image's first row, and of its first column, float32 [2, B, 1, 1]."""
    images = torch.arange(batch, dtype=torch.float32, device=device)
    return torch.stack((images * height, images * width)).view(2, -1, 1, 1)


@constant
def _taps(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.float32, device=device)


def _interpolate(at: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the two pixels that each result lies between, and their weights, both [2, B, S, 2].

    Beyond the centres of the outermost pixels, these alone count.
    """
    last = size - 1
    at = torch.clamp(at, floats((0.0,), at.device), last)
    before = at.floor()
    weights = (at - before).sub(floats((1.0, 0.0), at.device)).abs_()
    return torch.minimum(before + floats((0.0, 1.0), at.device), last), weights


def _antialias(at: Tensor, size: Tensor, side: int, taps: int) -> tuple[Tensor, Tensor]:
    """Returns the pixels under a triangle as wide as two results, at least two pixels, and their weights."""
    radius = (size / side).clamp_(min=1)
    pixels = (at - radius).ceil_() + _taps(taps, at.device)
    weights = torch.sub(radius, (pixels - at).abs_()).relu_()
    inside = torch.clamp(pixels, floats((0.0,), at.device), size - 1)
    weights.mul_(inside == pixels)
    return inside, weights.div_(weights.sum(3, keepdim=True))
