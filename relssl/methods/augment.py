"""The augmentations of ReSSL and SACC, drawn for each image of a batch on the batch's device (kornia)."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from relssl.datasets.crops import Crop
from relssl.methods.randaugment import RandAugment

with warnings.catch_warnings():  # kornia scripts a few functions on import.
    warnings.simplefilter("ignore")
    import kornia.augmentation as ka


class Augment(nn.Module):
    """Maps uint8 images [B, 3, H, W] to float crops [B, 3, size, size], augmented and normalised.

    Args:
        size: side of the crops in pixels.
        normalize: the last step, a Normalize or nn.Identity.
        crop: smallest and largest share of an image's area in a crop; aspect ratios are 3:4 to 4:3.
        flip: whether half the crops are flipped horizontally.
        jitter: strengths for brightness, contrast, saturation and hue, for 80 % of the crops; None for none.
        grey: share of the crops that are converted to grey.
        blur: whether half the crops are blurred: Gaussian, sigma 0.1 to 2, its kernel a tenth of the size.
        randaugment: number of RandAugment's operations; 0 for none.
    """

    def __init__(
        self,
        size: int,
        normalize: nn.Module,
        *,
        crop: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        jitter: tuple[float, float, float, float] | None = None,
        grey: float = 0.0,
        blur: bool = False,
        randaugment: int = 0,
    ) -> None:
        super().__init__()
        self.crop = Crop(size, crop, flip=flip)
        steps: list[Any] = []
        if jitter:
            steps += [ka.ColorJitter(*jitter, p=0.8)]
        if grey:
            steps += [ka.RandomGrayscale(p=grey)]
        if blur:
            kernel = max(3, size // 10 // 2 * 2 + 1)
            steps += [ka.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5)]
        self.steps = ka.AugmentationSequential(*steps) if steps else nn.Identity()
        resize = ka.RandomResizedCrop((size, size), scale=crop, cropping_mode="resample")
        self.cut = ka.AugmentationSequential(resize)
        self.flip = ka.AugmentationSequential(ka.RandomHorizontalFlip(p=0.5)) if flip else nn.Identity()
        self.randaugment = RandAugment(randaugment) if randaugment else nn.Identity()
        self.normalize = normalize

    @torch.no_grad()
    def forward(self, images: Tensor, cropped: bool = False) -> Tensor:
        """cropped: whether the images are random crops of `crop`, and flipped."""
        # In float32: coordinates that autocast rounds to 8 bits would select other pixels.
        with torch.autocast(images.device.type, enabled=False):
            x = images.float() / 255
            x = self.steps(x) if cropped else self.flip(self.steps(self.cut(x)))
            return self.normalize(self.randaugment(x))


class Normalize(nn.Module):
    """Subtracts a mean [3] by channel from images in [0, 1], and divides by a standard deviation [3]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone().view(1, 3, 1, 1))
        self.register_buffer("std", std.clone().view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
