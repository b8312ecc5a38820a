"""The views that are timed, and their peers: other packages' augmentations, with a view's own settings.

A peer makes, from a View and uint8 images [B, 3, H, W] on the device, a function without arguments that
returns augmented images there. It raises Unsupported with the reason why it cannot run. kornia augments a
batch on its device; all others augment an image at a time in DataLoader workers, as the published code does,
one for every core.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peers import Unsupported, lightly, package, solo_learn
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from relssl.augment import Normalize, View
from relssl.augment.blur import kernel_size
from relssl.methods import ressl, sacc

CIFAR = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # solo-learn's constants
Augment = Callable[[], Tensor]


def view_of(work: str, side: int) -> View:
    """Returns a view of one of the works in work.TITLES, for results of side x side pixels."""
    statistics = tuple(torch.tensor(values) for values in CIFAR)
    if work.startswith("sacc"):
        config: Any = replace(sacc.PRESETS["cifar10"], arch="conv4", image_size=side, clusters=10)
        return config.build(*statistics).strong
    config = replace(ressl.PRESETS["cifar10"], arch="conv4", image_size=side, queue_size=1)
    return config.build(*statistics).views[work == "strong_view"]


def pictures(count: int, side: int, device: str) -> Tensor:
    """Returns smooth uint8 images [B, 3, side, side]; crops of noise depend on how they are filtered."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    images = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)
    return images.mul(255).clamp(0, 255).byte().to(device)


def disagreement(first: Tensor, second: Tensor) -> float:
    """Compares augmented images [B, 3, S, S] of two peers.

    Returns the largest difference of the averages of two statistics, mean and standard deviation of an image
    by channel, in standard errors.
    """

    def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
        of_image = torch.stack((images.mean((2, 3)), images.std((2, 3)))).double()
        return of_image.mean(1), of_image.var(1) / len(images)

    (mean_1, variance_1), (mean_2, variance_2) = statistics(first), statistics(second)
    return ((mean_1 - mean_2).abs() / (variance_1 + variance_2).sqrt()).max().item()


class PerImage(Dataset):
    """Applies a transform of PIL images to one image at a time."""

    def __init__(self, images: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images.permute(0, 2, 3, 1).cpu().numpy(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.fromarray(self.images[index]))


def in_workers(images: Tensor, transform: Callable[[Image.Image], Tensor]) -> Augment:
    """Divides a batch among workers, which wait between calls."""
    workers = max(1, min(len(os.sched_getaffinity(0)), 16))
    loader = DataLoader(
        PerImage(images, transform),
        batch_size=-(-len(images) // workers),
        num_workers=workers,
        persistent_workers=True,
        pin_memory=images.is_cuda,
    )

    def run() -> Tensor:
        parts: Iterator[Tensor] = iter(loader)
        return torch.cat([part.to(images.device, non_blocking=True) for part in parts])

    return run


def statistics_of(view: View) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation by channel."""
    assert isinstance(view.normalize, Normalize)
    return view.normalize.mean.flatten().tolist(), view.normalize.std.flatten().tolist()


def kornia(view: View, images: Tensor) -> Augment:
    package("kornia", "kornia.augmentation")
    from kornia_view import KorniaView

    augment = KorniaView(view).to(images.device)
    return lambda: augment(images)


def torchvision(view: View, images: Tensor) -> Augment:
    from fixmatch import RandAugment
    from torchvision.transforms import v2

    steps: list[Any] = [
        v2.RandomResizedCrop(view.size, view.scale, view.ratio),
        v2.RandomHorizontalFlip(view.flip),
    ]
    if view.jitter:
        steps.append(v2.RandomApply([v2.ColorJitter(*view.jitter)], view.jitter_probability))
    if view.grey:
        steps.append(v2.RandomGrayscale(view.grey))
    if view.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel_size(view.size), view.sigma)], view.blur))
    if view.randaugment:
        steps.append(RandAugment(view.randaugment.operations))
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics_of(view))]
    return in_workers(images, v2.Compose(steps))


def without_randaugment(view: View, name: str) -> None:
    if view.randaugment:
        raise Unsupported(f"{name} has no RandAugment")


def by_lightly(view: View, images: Tensor) -> Augment:
    """The view of its SimCLR; it blurs with PIL's box filters."""
    without_randaugment(view, "lightly")
    bright, contrast, saturation, hue = view.jitter or (0.0,) * 4
    transform = lightly("lightly.transforms.simclr_transform").SimCLRViewTransform(
        input_size=view.size,
        cj_prob=view.jitter_probability if view.jitter else 0.0,
        cj_bright=bright,
        cj_contrast=contrast,
        cj_sat=saturation,
        cj_hue=hue,
        min_scale=view.scale[0],
        random_gray_scale=view.grey,
        gaussian_blur=view.blur,
        sigmas=view.sigma,
        hf_prob=view.flip,
        normalize=dict(zip(("mean", "std"), statistics_of(view), strict=True)),
    )
    return in_workers(images, transform)


def by_solo_learn(view: View, images: Tensor) -> Augment:
    """Its augmentation for CIFAR at any size: bicubic crops, blurred with PIL's box filters."""
    without_randaugment(view, "solo-learn")
    transform = solo_learn("utils/pretrain_dataloader").CifarTransform(
        *(view.jitter or (0.0,) * 4),
        color_jitter_prob=view.jitter_probability if view.jitter else 0.0,
        gray_scale_prob=view.grey,
        horizontal_flip_prob=view.flip,
        gaussian_prob=view.blur,
        min_scale=view.scale[0],
        max_scale=view.scale[1],
        crop_size=view.size,
    )
    return in_workers(images, transform)


def ours(view: View, images: Tensor) -> Augment:
    view = view.to(images.device)
    return lambda: view(images)


def compiled(view: View, images: Tensor) -> Augment:
    """relssl's view, compiled."""
    fast = torch.compile(view.to(images.device), fullgraph=True)
    return lambda: fast(images)


VIEWS: dict[str, Callable[[View, Tensor], Augment]] = {
    "relssl": ours,
    "torch.compile": compiled,
    "kornia": kornia,
    "torchvision": torchvision,
    "lightly": by_lightly,
    "solo-learn": by_solo_learn,
}
