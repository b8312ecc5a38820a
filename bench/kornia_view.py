"""A `View` of the same settings by kornia, with RandAugment by torchvision's functions for batches.

kornia draws RandAugment once for a whole batch. Here it is drawn for each image: every operation of each draw
gets the images that it changes, whose number differs from call to call.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.augment.blur import kernel_size

from relssl.datasets.torchvision_import import torchvision  # noqa: F401  isort: skip
from torchvision.transforms.v2 import functional as tv

with warnings.catch_warnings():  # kornia scripts a few functions on import.
    warnings.simplefilter("ignore")
    import kornia.augmentation as ka


class KorniaView(nn.Module):
    """Maps uint8 images [B, 3, H, W] to what `view`, a View, maps them to, with kornia's steps."""

    def __init__(self, view: Any) -> None:
        super().__init__()
        side = view.size
        steps: list[Any] = [
            ka.RandomResizedCrop((side, side), scale=view.scale, ratio=view.ratio, cropping_mode="resample")
        ]
        if view.jitter:
            brightness, contrast, saturation, hue = view.jitter
            steps.append(ka.ColorJitter(brightness, contrast, saturation, hue, p=view.jitter_probability))
        if view.grey:
            steps.append(ka.RandomGrayscale(p=view.grey))
        if view.blur:
            kernel = kernel_size(side)
            steps.append(ka.RandomGaussianBlur((kernel, kernel), view.sigma, p=view.blur))
        steps.append(ka.RandomHorizontalFlip(p=view.flip))
        self.steps = ka.AugmentationSequential(*steps)
        self.operations = view.randaugment.operations if view.randaugment else 0
        self.normalize = view.normalize or nn.Identity()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.normalize(randaugment(self.steps(images.float() / 255), self.operations))


def randaugment(images: Tensor, operations: int) -> Tensor:
    """Applies FixMatch's RandAugment to float images [B, 3, H, W] in [0, 1], in place."""
    for _ in range(operations):
        count = len(images)
        drawn = torch.randint(len(OPERATIONS), (count,))  # on the CPU: no synchronisation for indices
        applied, strength = torch.rand(count) < 0.5, torch.randint(1, 10, (count,)) / 10
        sign = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
        for number, (operation, value_of) in enumerate(OPERATIONS):
            rows = ((drawn == number) & applied).nonzero().flatten()
            if len(rows):
                value = value_of(strength[rows], sign[rows])
                rows, value = (t.to(images.device, non_blocking=True) for t in (rows, value))
                images[rows] = operation(images[rows], value.view(-1, 1, 1, 1))
    return images


def affine(x: Tensor, *matrix: tuple[Tensor | float, ...]) -> Tensor:
    """Takes each pixel from the nearest to matrix · (column, row, 1), from -1 to 1; black outside."""
    zero = x.new_zeros(len(x), 1, 1, 1)
    theta = torch.cat([zero + c for row in matrix for c in row], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", align_corners=False)


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    return affine(x, (cos, -sin, 0.0), (sin, cos, 0.0))


def smooth(x: Tensor) -> Tensor:
    """Applies PIL's SMOOTH filter, which does not change the border."""
    kernel = x.new_ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    y = x.clone()
    y[..., 1:-1, 1:-1] = F.conv2d(x, kernel / 13, groups=3)
    return y


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    step = 2 ** (8 - bits)
    return (x * 255 / step).floor() * step / 255


def equalize(x: Tensor, _: Tensor) -> Tensor:
    return tv.equalize((x * 255).round().to(torch.uint8)).to(x.dtype) / 255


def blend(degenerate: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, share: torch.lerp(degenerate(x).expand_as(x), x, share)


def share(strength: Tensor, _: Tensor) -> Tensor:
    return 0.9 * strength + 0.05


def moved(strength: Tensor, sign: Tensor) -> Tensor:
    return 0.3 * strength * sign


def whole(span: int, offset: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda strength, _: (span * strength + 1e-4).floor() + offset


# Each operation, and its value from a strength up to 0.9 and a sign; in the order of relssl's.
OPERATIONS = (
    (lambda x, _: tv.autocontrast(x), share),
    (blend(lambda x: x.new_zeros(1)), share),
    (blend(tv.rgb_to_grayscale), share),
    (blend(lambda x: tv.rgb_to_grayscale(x).mean((2, 3), keepdim=True)), share),
    (equalize, share),
    (lambda x, _: x, share),
    (posterize, whole(4, 4)),
    (rotate, lambda strength, sign: (30 * strength + 1e-4).floor() * sign),
    (blend(smooth), share),
    (lambda x, v: affine(x, (1.0, v, v), (0.0, 1.0, 0.0)), moved),
    (lambda x, v: affine(x, (1.0, 0.0, 0.0), (v, 1.0, v)), moved),
    (lambda x, v: torch.where(x >= (256 - v) / 255, 1 - x, x), whole(256)),
    (lambda x, v: affine(x, (1.0, 0.0, 2 * v), (0.0, 1.0, 0.0)), moved),
    (lambda x, v: affine(x, (1.0, 0.0, 0.0), (0.0, 1.0, 2 * v)), moved),
)
