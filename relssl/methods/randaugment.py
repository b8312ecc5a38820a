"""RandAugment as in SACC, on batches and any device: operations are drawn for each image.

Fourteen operations and their ranges as in FixMatch's code (Sohn et al., NeurIPS 2020), sampled with
replacement, each applied with probability one half at one of nine strengths. The implementations in libraries
draw once for a whole batch, or process one image at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.datasets.torchvision_import import torchvision  # noqa: F401  isort: skip
from torchvision.transforms.v2 import functional as tv  # The import above makes this possible.

# Maps float images [B, 3, H, W] in [0, 1] and a value for each, [B, 1, 1, 1], to images.
Operation = Callable[[Tensor, Tensor], Tensor]


def _smooth(x: Tensor) -> Tensor:
    """Applies PIL's SMOOTH filter, (1 1 1; 1 5 1; 1 1 1) / 13, which does not change the border."""
    kernel = x.new_ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    y = x.clone()
    y[..., 1:-1, 1:-1] = F.conv2d(x, kernel / 13, groups=3)
    return y


def _mean_grey(x: Tensor) -> Tensor:
    return tv.rgb_to_grayscale(x).mean((2, 3), keepdim=True)


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    step = 2 ** (8 - bits)
    return (x * 255 / step).floor() * step / 255


def _equalize(x: Tensor, _: Tensor) -> Tensor:
    return tv.equalize((x * 255).round().to(torch.uint8)).to(x.dtype) / 255


def _affine(x: Tensor, *rows: tuple[Tensor | float, Tensor | float, Tensor | float]) -> Tensor:
    """Takes each output pixel from the input pixel nearest to rows · (column, row, 1); black outside.

    Coordinates run from -1 to 1 along each side of the image, which must be square.
    """
    zero = x.new_zeros(len(x), 1, 1, 1)
    matrix = torch.cat([zero + c for row in rows for c in row], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _rotate(x: Tensor, degrees: Tensor) -> Tensor:
    angle = degrees.deg2rad()
    cos, sin = angle.cos(), angle.sin()
    return _affine(x, (cos, -sin, 0.0), (sin, cos, 0.0))


def _blend(degenerate: Callable[[Tensor], Tensor]) -> Operation:
    """Interpolates from an image's degenerate form (0) to itself (1), as PIL's enhancements do."""
    return lambda x, share: torch.lerp(degenerate(x).expand_as(x), x, share)


# name: operation, range and offset of its value (offset + range · strength / 10), and whether the value has a
# random sign and whether it is rounded down.
OPERATIONS: dict[str, tuple[Operation, float, float, bool, bool]] = {
    "autocontrast": (lambda x, _: tv.autocontrast(x), 0, 0, False, False),
    "brightness": (_blend(lambda x: x.new_zeros(1)), 0.9, 0.05, False, False),
    "colour": (_blend(tv.rgb_to_grayscale), 0.9, 0.05, False, False),
    "contrast": (_blend(_mean_grey), 0.9, 0.05, False, False),
    "equalize": (_equalize, 0, 0, False, False),
    "identity": (lambda x, _: x, 0, 0, False, False),
    "posterize": (_posterize, 4, 4, False, True),
    "rotate": (_rotate, 30, 0, True, True),
    "sharpness": (_blend(_smooth), 0.9, 0.05, False, False),
    "shear x": (lambda x, v: _affine(x, (1.0, v, v), (0.0, 1.0, 0.0)), 0.3, 0, True, False),
    "shear y": (lambda x, v: _affine(x, (1.0, 0.0, 0.0), (v, 1.0, v)), 0.3, 0, True, False),
    "solarize": (lambda x, v: torch.where(x >= (256 - v) / 255, 1 - x, x), 256, 0, False, True),
    "translate x": (lambda x, v: _affine(x, (1.0, 0.0, 2 * v), (0.0, 1.0, 0.0)), 0.3, 0, True, False),
    "translate y": (lambda x, v: _affine(x, (1.0, 0.0, 0.0), (0.0, 1.0, 2 * v)), 0.3, 0, True, False),
}


class RandAugment(nn.Module):
    """Applies `operations` draws from OPERATIONS to each of the float images [B, 3, H, W] in [0, 1].

    Args:
        operations: number of draws for each image, n; half of them are applied. (SACC: 5)
        strength: m; strengths are drawn from 1 to m - 1. (SACC: 10)
    """

    def __init__(self, operations: int = 5, strength: int = 10) -> None:
        super().__init__()
        self.operations, self.strength = operations, strength

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = images.clone()
        for _ in range(self.operations):
            # Drawn on the CPU, so that indices are known without a synchronisation.
            count = len(images)
            drawn = torch.randint(len(OPERATIONS), (count,))
            applied = torch.rand(count) < 0.5
            strength = torch.randint(1, self.strength, (count,)) / 10
            sign = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
            for number, (operation, span, offset, signed, round_down) in enumerate(OPERATIONS.values()):
                rows = torch.nonzero((drawn == number) & applied).flatten()
                if len(rows) == 0:
                    continue
                value = strength[rows] * span
                value = (value + 1e-4).floor() if round_down else value
                value = (value + offset) * (sign[rows] if signed else 1.0)
                rows, value = (t.to(images.device, non_blocking=True) for t in (rows, value))
                images[rows] = operation(images[rows], value.view(-1, 1, 1, 1))
        return images
