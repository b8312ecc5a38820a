"""ReSSL's weak and strong augmentations, drawn for each image of a batch on the batch's device (kornia)."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():  # kornia scripts a few functions while it is imported.
    warnings.simplefilter("ignore")
    import kornia.augmentation as ka


class Augment(nn.Module):
    """uint8 images [B, 3, H, W] to float crops [B, 3, size, size], augmented and standardised.

    weak:   random resized crop (crop_min, published 0.2, to 1 of the area), horizontal flip.
    strong: the same with colour jitter (0.4, 0.4, 0.4, 0.1) at p = 0.8, grey at p = 0.2 and Gaussian blur
            (sigma 0.1 to 2, kernel a tenth of the size) at p = 0.5, as ReSSL's published code draws them.
    """

    def __init__(
        self, size: int, mean: Tensor, std: Tensor, crop_min: float = 0.2, flip: bool = True, *, strong: bool
    ) -> None:
        super().__init__()
        steps: list[Any] = [
            ka.RandomResizedCrop((size, size), scale=(crop_min, 1.0), cropping_mode="resample")
        ]
        if strong:
            kernel = max(3, size // 10 // 2 * 2 + 1)
            steps += [
                ka.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
                ka.RandomGrayscale(p=0.2),
                ka.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5),
            ]
        if flip:
            steps += [ka.RandomHorizontalFlip(p=0.5)]
        self.steps = ka.AugmentationSequential(*steps)
        self.standardise = Standardise(mean, std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.standardise(self.steps(images.float() / 255))


class Standardise(nn.Module):
    """Images in [0, 1] less the data set's mean, over its standard deviation, by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone().view(1, 3, 1, 1))
        self.register_buffer("std", std.clone().view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
