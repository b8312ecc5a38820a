"""RandAugment as in SACC and FixMatch, drawn for each image of a batch, with PIL's results on every device.

All images go through the three steps of operations.py in each of the draws, with coefficients from tables. So
shapes are static, and which kernels run does not depend on the draws.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.augment.draw import constant, floats
from relssl.augment.operations import OPERATIONS, Coefficients, coefficients
from relssl.backends.common import autocast_off

FIXED = 65536  # PIL's coordinates are in units of 1/65536 pixel.
SMOOTH = (1.0, 1.0, 1.0), (1.0, 5.0, 1.0), (1.0, 1.0, 1.0)  # PIL's filter, thirteen times
LARGE = 2**17  # On the CPU, the steps get only the images that they change in batches of so many elements.


class RandAugment(nn.Module):
    """Applies RandAugment (Cubuk et al., 2020) as in FixMatch's code (Sohn et al., 2020) to each image.

    The fourteen OPERATIONS are drawn with replacement; each is applied with probability 1/2, with a random
    strength from 1 to `strength` - 1 and a random sign. The results are those of PIL.

    Args:
        operations: number of draws for each image; half of them are applied. (SACC: 5)
        strength: an integer from 2 to 10. (SACC: 10)
    """

    geometry: Tensor
    tables: Tensor
    columns: Tensor

    def __init__(self, operations: int = 5, strength: int = 10) -> None:
        super().__init__()
        if operations < 1 or operations != int(operations):
            raise ValueError(f"operations must be an integer of at least 1, got {operations}")
        if not 2 <= strength <= 10 or strength != int(strength):
            raise ValueError(f"strength must be an integer from 2 to 10, got {strength}")
        self.operations, self.strength = operations, strength
        for name, table in zip(("geometry", "tables", "columns"), _tables(strength), strict=True):
            # As integers, which module.bfloat16() does not round.
            bits = {torch.float64: torch.int64, torch.float32: torch.int32}.get(table.dtype, table.dtype)
            self.register_buffer(name, table.view(bits), persistent=False)

    @property
    def _num_draws(self) -> int:
        return 2 * len(OPERATIONS) * (self.strength - 1) * 2  # names, strengths, signs, whether applied

    def index(self, name: str, strength: int = 1, sign: int = 1, *, applied: bool = True) -> int:
        """Returns the draw of one of OPERATIONS with a strength, and with a sign, 1 or -1, if it has one."""
        if name not in OPERATIONS:
            raise ValueError(f"name must be one of {', '.join(OPERATIONS)}, not {name}")
        if not 1 <= strength < self.strength:
            raise ValueError(f"strength must be from 1 to {self.strength - 1}, not {strength}")
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, not {sign}")
        row = (OPERATIONS.index(name) * (self.strength - 1) + strength - 1) * 2 + (sign < 0)
        return row if applied else row + self._num_draws // 2

    def draw(self, batch: int, device: torch.device | str) -> Tensor:
        """Draws values of `index` with equal probabilities: int64 [operations, batch]."""
        return torch.randint(self._num_draws, (self.operations, batch), device=device)

    @torch.no_grad()
    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns the augmented images: float32 [B, 3, H, W], whole numbers from 0 to 255.

        Args:
            images: float32 [B, 3, H, W] from 0 to 255, which are rounded; H and W are at least 3.
            draws: int64 [operations, B] on the images' device, values of `index`; drawn if None.
        """
        if images.dtype != torch.float32:
            raise TypeError(f"images must be float32, not {images.dtype}")
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 3:
            raise ValueError(f"images must be [B, 3, H, W] with sides of 3 or more, not {list(images.shape)}")
        if draws is None:
            draws = self.draw(len(images), images.device)
        if draws.dtype != torch.int64:
            raise TypeError(f"draws must be int64, not {draws.dtype}")
        if draws.shape != (self.operations, len(images)):
            raise ValueError(f"draws must be {[self.operations, len(images)]}, not {list(draws.shape)}")
        if len(images) == 0:
            return images.clone()
        with autocast_off(images.device):
            images = images.round()
            tables, columns = self.tables[draws], self.columns.view(torch.float32)[draws]
            along, down = _coordinates(self.geometry.view(torch.float64)[draws], *images.shape[2:])
            counts = images.new_zeros(*draws.shape, 3, 257)
            for slot, rows in enumerate(self._changed(draws, images.numel())):
                images = _apply(_resample, rows[0], images, along[slot], down[slot])
                images = _apply(_map, rows[1], images, tables[slot], columns[slot], counts[slot])
                images = _apply(_blend, rows[2], images, columns[slot])
        return images

    def _changed(self, draws: Tensor, size: int) -> Sequence[Sequence[Tensor | None]]:
        """Returns the images that each draw's steps get: those they change on the CPU, or None for all.

        The draws of another device, and those of a compiled graph, would have to be waited for. A selection
        has more, but smaller operations: a third of the time for large batches on the CPU.
        """
        if torch.compiler.is_compiling() or draws.device.type != "cpu" or size < LARGE:
            return [(None, None, None)] * self.operations
        changes = _changes(self.strength)[draws.numpy()]  # [operations, B, 3]
        return [[torch.from_numpy(step.nonzero()[0]) for step in slot.T] for slot in changes]


def _rows(strength: int) -> list[Coefficients]:
    """Returns the coefficients of each draw, in the order of `RandAugment.index`."""
    rows = [coefficients(*case) for case in product(OPERATIONS, range(1, strength), (1, -1))]
    return rows + [Coefficients()] * len(rows)  # The latter are not applied.


@lru_cache
def _changes(strength: int) -> np.ndarray:
    """Returns whether each draw's three steps change an image."""
    return np.array([[a != b for a, b in zip(r, Coefficients(), strict=True)] for r in _rows(strength)])


def _tables(strength: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the coefficients of each draw's three steps: [draws, 2, 6], [draws, 256] and [draws, 5]."""
    rows = _rows(strength)
    matrix = torch.tensor([row.resampling.matrix for row in rows], dtype=torch.float64)
    centred = torch.tensor([row.resampling.centred for row in rows]).view(-1, 1, 1)
    shift = torch.tensor([row.resampling.shift for row in rows], dtype=torch.float64).unsqueeze(2)
    about = torch.where(centred, torch.eye(2) - matrix, 0.0) / 2 * FIXED
    first = matrix.sum(2, keepdim=True) / 2 * FIXED + 0.5  # the first pixel's centre, and one half to round
    # For the input's x and y: factors of the output's x and y, of width and height, the shift, a constant.
    geometry = torch.cat(((matrix * FIXED + 0.5).floor(), about, shift, first), 2)
    tables = torch.tensor([row.mapping.table for row in rows], dtype=torch.uint8)
    columns = torch.tensor([row.mapping[1:] + row.blending for row in rows], dtype=torch.float32)
    return geometry, tables, columns


@constant
def _levels(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.float64, device=device)


def _coordinates(geometry: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns grid_sample's x and y as a sum of [operations, B, 2, 1, width] and [..., height, 1].

    geometry: rows of `_tables`, [operations, B, 2, 6].
    """

    def pair(x: float, y: float) -> Tensor:  # made on the device; torch.tensor would wait for a copy
        return torch.linspace(x, y, 2, dtype=torch.float64, device=geometry.device)

    size, unit = pair(width, height), pair(2 / FIXED / width, 2 / FIXED / height)
    border = pair(1 / FIXED / width - 1, 1 / FIXED / height - 1)  # plus half a unit: PIL rounds ties down
    matrix, centre, shift, first = geometry.split((2, 2, 1, 1), 3)
    offset = first.squeeze(3).add((shift.squeeze(3) * size).trunc_(), alpha=FIXED)
    offset = offset.add_((centre * size).sum(3)).floor_()
    offset = torch.addcmul(border, offset, unit)[..., None, None]
    by_column, by_row = (matrix * unit.unsqueeze(1))[..., None, None, :].unbind(5)
    along = torch.addcmul(offset, by_column, torch.arange(width, device=geometry.device))
    return along.float(), (by_row * torch.arange(height, device=geometry.device).unsqueeze(1)).float()


def _map(images: Tensor, table: Tensor, columns: Tensor, counts: Tensor) -> Tensor:
    """Replaces levels by those of a table [B, 256] or a histogram's; counts [B, 3, 257] are zeros."""
    stretch_above, equalize_above = columns[:, :2, None, None].unbind(1)
    levels = images.flatten(2).long()
    counts[..., 1:].scatter_add_(2, levels, floats((1.0,), levels.device).expand_as(levels))
    below = counts.cumsum(2)[..., :-1]  # the number of pixels with a level below each
    lowest, highest = torch.aminmax(levels, dim=2, keepdim=True)
    span = highest - lowest
    scale = torch.div(_levels(levels.device)[255], span)  # in float64, as PIL's
    stretched = (_levels(levels.device) * scale).sub_(lowest * scale)
    step = torch.div(below.gather(2, highest), 255, rounding_mode="floor")
    equalized = below.div(step).add_(0.5).clamp_(max=255)
    table = torch.where(span > stretch_above, stretched, table.unsqueeze(1))
    table = torch.where(step > equalize_above, equalized, table)
    return table.floor_().float().gather(2, levels).view_as(images)


def _blend(images: Tensor, columns: Tensor) -> Tensor:
    """Interpolates between the mean of grey, the grey or the smoothed image and the images, in place."""
    share, grey, smooth = columns[:, 2:, None, None, None].unbind(1)
    luma = torch.add(floats((0.5,), images.device), images[:, :1], alpha=19595 / FIXED)
    luma = luma.add_(images[:, 1:2], alpha=38470 / FIXED).add_(images[:, 2:], alpha=7471 / FIXED).floor_()
    mean = luma.mean((1, 2, 3), keepdim=True).add_(0.5).floor_()
    base = torch.lerp(torch.lerp(mean, luma, grey), images, smooth)
    # Whole numbers, which TF32 does not round. A group for each plane is fast on the CPU.
    planes = images.flatten(0, 1).unsqueeze(0)
    kernel = floats(SMOOTH, images.device)
    sums = F.conv2d(planes, kernel.expand(planes.shape[1], 1, 3, 3), groups=planes.shape[1])
    inner = base[..., 1:-1, 1:-1]  # PIL's filter does not change the border.
    inner.lerp_(sums.div_(13).round_().view_as(inner), smooth)
    return images.sub_(base).mul_(share).add_(base).floor_()


def _resample(images: Tensor, along: Tensor, down: Tensor) -> Tensor:
    grid = (along + down).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _apply(step: Callable[..., Tensor], rows: Tensor | None, images: Tensor, *coefficients: Tensor) -> Tensor:
    """Applies a step to the given rows of the images, or to all; the step does not change the other rows."""
    if rows is None:
        return step(images, *coefficients)
    if len(rows) == 0:
        return images
    return images.index_copy_(0, rows, step(images[rows], *(c[rows] for c in coefficients)))
