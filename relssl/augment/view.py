"""`View`: a random augmentation of a batch of images, drawn anew for each image."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from relssl.augment.blur import blur
from relssl.augment.colour import jitter, to_grey
from relssl.augment.crop import box_ranges, boxes, crop
from relssl.augment.draw import Range, chance, draw
from relssl.augment.randaugment import RandAugment
from relssl.backends.common import autocast_off
from relssl.datasets.crops import Crop


class ViewParameters(NamedTuple):
    """What a `View` draws for B images; float32 unless stated otherwise, None for what the view lacks.

    Attributes:
        start: top and left of the crop's box, [B, 2] in whole pixels.
        size: height and width of the box, [B, 2] in whole pixels. A box must lie within its image, which is
            not checked, since that would wait for the device.
        flip: 1 where the crop is mirrored horizontally, else 0, [B].
        jitter: what is added to the factors of brightness, contrast and saturation, which are 1, and to the
            hue, in turns; [B, 4].
        order: when each of the four is applied, from 0 to 3; int64 [B, 4].
        grey: 1 where the crop is converted to grey, else 0, [B].
        sigma: standard deviation of the blur in pixels, 0 for none, [B].
        operations: the draws of `RandAugment`, int64 [operations, B].
    """

    start: Tensor
    size: Tensor
    flip: Tensor
    jitter: Tensor | None = None
    order: Tensor | None = None
    grey: Tensor | None = None
    sigma: Tensor | None = None
    operations: Tensor | None = None


def _positive_range(name: str, values: Sequence[float], most: float = sys.float_info.max) -> Range:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
        bound = f" up to {most:g}" if most == 1 else ""
        raise ValueError(f"{name} must be two numbers above 0{bound}, the smaller first, got {values}")
    return float(values[0]), float(values[1])


class View(nn.Module):
    """Augments uint8 images [B, 3, H, W] to float32 images [B, 3, size, size] in [0, 1], or normalised.

    The steps are a random resized crop with a horizontal flip, colour jitter, grey, blur and RandAugment, as
    in SimCLR (Chen et al., ICML 2020) and SACC. All but RandAugment compute what the functions of
    torchvision.transforms.v2 compute for float images, with parameters of its own for each image. They run
    on the images' device without a synchronisation, in float32 whatever autocast or TF32 are set to, and
    torch.compile(fullgraph=True) accepts them. The view has no weights, and no gradient passes through it.

    Args:
        size: side of the result in pixels.
        scale: smallest and largest share of an image's area in a crop.
        ratio: smallest and largest ratio of a crop's width to its height.
        flip: probability of a horizontal flip.
        jitter: strengths of brightness, contrast, saturation and hue, as in torchvision's ColorJitter.
        jitter_probability: probability of the colour jitter.
        grey: probability of the conversion to grey.
        blur: probability of the blur, whose kernel is a tenth of the size, odd, and at least 3 pixels wide.
        sigma: smallest and largest standard deviation of the blur in pixels.
        randaugment: the last step before normalisation, or None.
        normalize: a module that maps images in [0, 1] to the result, such as `Normalize`, or None.

    Raises:
        ValueError: a setting is out of its range, or images have another dtype or shape.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: Sequence[float] | None = None,
        jitter_probability: float = 0.8,
        grey: float = 0.0,
        blur: float = 0.0,
        sigma: Sequence[float] = (0.1, 2.0),
        randaugment: RandAugment | None = None,
        normalize: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.scale, self.ratio = _positive_range("scale", scale, 1.0), _positive_range("ratio", ratio)
        self.sigma = _positive_range("sigma", sigma)
        self.flip, self.jitter_probability, self.grey, self.blur = flip, jitter_probability, grey, blur
        self.jitter = None if jitter is None else tuple(jitter)
        self.randaugment, self.normalize = randaugment, normalize
        self._check()

    def _check(self) -> None:
        least = 3 if self.randaugment else 1
        if self.size < least or self.size != int(self.size):
            raise ValueError(f"size must be an integer of at least {least}, got {self.size}")
        for name in ("flip", "jitter_probability", "grey", "blur"):
            if not 0 <= (probability := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {probability}")
        if self.jitter is not None and (
            len(self.jitter) != 4
            or not all(0 <= strength < math.inf for strength in self.jitter)
            or self.jitter[3] > 0.5
        ):
            raise ValueError(f"jitter must be four strengths, that of the hue up to 0.5, got {self.jitter}")

    @property
    def crop(self) -> Crop:
        """The view's random crop, for images that are read from files."""
        return Crop(self.size, self.scale, self.ratio, self.flip)

    def draw(self, batch: int, height: int, width: int, device: torch.device | str) -> ViewParameters:
        """Draws the parameters of a batch of images of this size, on this device."""
        device = torch.empty(0, device=device).device  # which has an index
        strengths = self.jitter or (0.0, 0.0, 0.0, 0.0)
        changes = tuple((-min(s, 1.0), s) for s in strengths)
        chances = tuple(map(chance, (self.flip, self.jitter_probability, self.grey, self.blur)))
        boxes_from = box_ranges(height, width, self.scale, self.ratio)
        areas, half_logs, positions, change, keys, applied, sigma = draw(
            batch, device, *boxes_from, changes, ((0.0, 1.0),) * 4, chances, (self.sigma,)
        )
        applied = applied.floor()
        start, size = boxes(areas, half_logs, positions, height, width)
        return ViewParameters(
            start,
            size,
            applied[:, 0],
            jitter=change * applied[:, 1:2] if self.jitter else None,
            order=keys.argsort(1) if self.jitter else None,
            grey=applied[:, 2] if self.grey else None,
            sigma=sigma[:, 0] * applied[:, 3] if self.blur else None,
            operations=self.randaugment.draw(batch, device) if self.randaugment else None,
        )

    @torch.no_grad()
    def forward(
        self, images: Tensor, parameters: ViewParameters | None = None, *, cropped: bool = False
    ) -> Tensor:
        """Augments uint8 images [B, 3, H, W].

        Args:
            parameters: what to apply, instead of a new draw.
            cropped: whether the images are crops of the final size, mirrored or not, already.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        if images.shape[2] == 0 or images.shape[3] == 0:
            raise ValueError(f"images must not be empty, got {list(images.shape)}")
        if cropped and images.shape[2:] != (self.size, self.size):
            raise ValueError(f"cropped images must be {self.size} x {self.size}, got {list(images.shape)}")
        if parameters is not None and len(parameters.start) != len(images):
            raise ValueError(f"parameters are of {len(parameters.start)} images, got {len(images)} images")
        with autocast_off(images.device):
            if parameters is None:
                height, width = images.shape[2:]
                parameters = self.draw(len(images), height, width, images.device)
            p = parameters
            if cropped:
                x = images.permute(0, 3, 1, 2).float()
            else:
                x = crop(images, p.start, p.size, p.flip, self.size)
            if p.jitter is not None and p.order is not None:
                x = jitter(x, p.jitter, p.order)
            if p.grey is not None:
                x = x.lerp(to_grey(x), p.grey.view(-1, 1, 1, 1))
            if p.sigma is not None:
                x = blur(x, p.sigma)
            x = x.permute(0, 2, 3, 1).contiguous()
            if self.randaugment and p.operations is not None:
                x = self.randaugment(x, p.operations)
            x = x.div_(255)
            return x if self.normalize is None else self.normalize(x)
