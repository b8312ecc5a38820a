"""What ReSSL and MoCo share: a student, its moving average as teacher, and a queue of the teacher's keys."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.augment import Normalize, View
from relssl.distributed import broadcast, rank, world_size
from relssl.groups import Group, all_gather
from relssl.methods.backbones import build
from relssl.methods.base import Method, TrainConfig, at_least_float32
from relssl.queue import FeatureQueue

# Steps of the strong view: MoCo v2's, and ReSSL's of the student.
STRONG: dict[str, Any] = {"jitter": (0.4, 0.4, 0.4, 0.1), "grey": 0.2, "blur": 0.5}


@dataclass
class MomentumConfig(TrainConfig):
    """Settings of a student with a momentum teacher. In brackets: where a default comes from."""

    dim: int = 128
    """Width D of the embeddings. [ReSSL: 128 on small data sets, 512 on ImageNet; MoCo: 128]"""
    hidden: int = 2048
    """Hidden width of the projector. [ReSSL: 2048 on small data sets, 4096 on ImageNet; MoCo v2: 2048]"""
    momentum: float = 0.99
    """Momentum m of the teacher's moving average. [ReSSL: 0.99 CIFAR, 0.996 STL-10, 0.999 ImageNet; MoCo:
    0.999 ImageNet]"""
    bn_splits: int = 8
    """Parts of a batch with separate BatchNorm statistics, on one GPU. [ReSSL: 8 on small data sets]"""
    crop_min: float = 0.2
    """Smallest share of an image's area in a crop, in both views. [ReSSL, MoCo: 0.2; digits 0.5]"""
    flip: bool = True
    """Horizontal flips in both augmentations. [ReSSL, MoCo; not for digits]"""


class MomentumMethod(Method):
    """A student, its moving average as the teacher, and a queue of the teacher's embeddings.

    The teacher is updated before its forward pass, the loss is computed with the old queue, and the keys are
    enqueued before backward. `encode` returns the keys first.

    Args:
        config: see MomentumConfig.
        mean, std: statistics of the training images in [0, 1], by channel, [3].
    """

    compares_images = False
    config: MomentumConfig
    queue: FeatureQueue

    def __init__(self, config: MomentumConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.config = config
        backbone, width = build(config.arch, config.stem, config.bn_splits)
        projector = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.dim),
        )
        self.student = ProjectedEncoder({"backbone": backbone, "projector": projector})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.queue = config.build_queue(config.dim)
        self.normalize = Normalize(mean, std)

    def view(self, side: float = 1.0, **steps: Any) -> View:
        """Builds a view whose side and areas of crops are a share of the largest ones."""
        size, scale = round(self.config.image_size * side), (self.config.crop_min * side, side)
        return View(size, scale=scale, flip=0.5 * self.config.flip, normalize=self.normalize, **steps)

    @property
    def backbone(self) -> nn.Module:
        """The student's backbone, without its projector."""
        return self.student["backbone"]

    @property
    def networks(self) -> list[nn.Module]:
        return [self.student, self.teacher]

    def update_queue(self, outputs: Sequence[Tensor], ids: Tensor | None = None) -> None:
        self.queue.enqueue(outputs[0], ids)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Moves the teacher's parameters; its BatchNorm has its own statistics, as in the authors' code."""
        teacher, student = tuple(self.teacher.parameters()), tuple(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - self.config.momentum)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Computes teacher embeddings [B, D], with images shuffled over processes and BatchNorm's parts.

        So BatchNorm's statistics are of other images than the student's, and reveal no key (MoCo's shuffle).
        """
        if self.config.bn_splits == 1 and world_size() == 1:
            return embed(self.teacher, images)
        order = broadcast(torch.randperm(world_size() * len(images), device=images.device))
        own = slice(rank() * len(images), (rank() + 1) * len(images))
        everyone = Group()
        keys = all_gather(embed(self.teacher, all_gather(images, everyone)[order[own]]), everyone)
        return keys[order.argsort()[own]]

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return embed(self.teacher, self.prepare(images))


class ProjectedEncoder(nn.ModuleDict):
    """A backbone and its projector."""

    def forward(self, images: Tensor) -> Tensor:
        return self["projector"](self["backbone"](images))


def embed(encoder: nn.Module, images: Tensor, predictor: nn.Module | None = None) -> Tensor:
    """Computes unit-norm embeddings [B, D]."""
    z = encoder(images)
    return F.normalize(at_least_float32(predictor(z) if predictor else z), dim=1)
