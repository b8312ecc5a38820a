"""ReSSL: a student whose strongly augmented view relates to past embeddings as the teacher's weak view does.

Zheng et al., ReSSL: Relational Self-Supervised Learning with Weak Augmentation, NeurIPS 2021. The steps
and defaults are those of the authors' code.
"""

import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.functional import relation_loss
from relssl.methods.augment import Augment, Standardise
from relssl.methods.backbones import Arch, Stem, build
from relssl.methods.base import Method, TrainConfig
from relssl.queue import FeatureQueue


@dataclass
class ReSSLConfig(TrainConfig):
    """Train ReSSL. In brackets: where a default comes from. The defaults shown are those of the preset."""

    arch: Arch = "resnet18"
    """Encoder. [ReSSL: resnet18 on small data sets, resnet50 on ImageNet]"""
    stem: Stem = "small"
    """First layers of a ResNet. [ReSSL: 3x3 without pooling at 32 px, with it at 64 px]"""
    dim: int = 128
    """Width D of the embeddings. [ReSSL: 128 on small data sets, 512 on ImageNet]"""
    hidden: int = 2048
    """Hidden width of the projector. [ReSSL: 2048 on small data sets, 4096 on ImageNet]"""
    queue_size: int = 4096
    """Past embeddings K to compare with. [ReSSL: 4096 CIFAR, 16384 STL-10, 131072 ImageNet]"""
    queue_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the queue; a 16-bit one is the dtype the loss is computed in. [ReSSL: float32]"""
    momentum: float = 0.99
    """m of the teacher's moving average. [ReSSL: 0.99 CIFAR, 0.996 STL-10, 0.999 ImageNet]"""
    student_temperature: float = 0.1
    """Temperature of the student's softmax. [ReSSL]"""
    teacher_temperature: float = 0.04
    """Temperature of the teacher's softmax. [ReSSL]"""
    bn_splits: int = 8
    """Parts of a batch that BatchNorm sees apart, on one GPU. [ReSSL: 8 on small data sets]"""
    crop_min: float = 0.2
    """Least share of an image's area that a crop keeps, in both views. [ReSSL: 0.2; digits 0.5]"""
    flip: bool = True
    """Horizontal flips in both augmentations. [ReSSL; not for digits]"""
    backend: str = "auto"
    """Who computes the loss (see relssl info). [relssl]"""

    def build(self, mean: Tensor, std: Tensor) -> "ReSSL":
        return ReSSL(self, mean, std)


_SMALL = ReSSLConfig()
_MEDIUM = replace(_SMALL, image_size=64, stem="small-pool", queue_size=16384, momentum=0.996)
PRESETS = {
    "cifar10": _SMALL,
    "cifar100": replace(_SMALL, data="cifar100"),
    "arrays": replace(_SMALL, data="arrays"),
    "stl10": replace(_MEDIUM, data="stl10"),
    "tiny-imagenet": replace(_MEDIUM, data="folder"),
    "folder": replace(
        _SMALL, data="folder", image_size=224, arch="resnet50", stem="imagenet", dim=512, hidden=4096,
        queue_size=131072, momentum=0.999, lr=0.05, weight_decay=1e-4, decay_norm_and_bias=False, bn_splits=1,
    ),
    # relssl's own, for minutes on a CPU: 1,437 small grey images.
    "digits": replace(
        _SMALL, data="digits", image_size=16, arch="conv4", hidden=512, queue_size=1024, epochs=20,
        warmup_epochs=1, batch_size=64, bn_splits=1, crop_min=0.5, flip=False,
    ),
}  # fmt: skip
PRESETS["imagenet"] = PRESETS["folder"]


class ReSSL(Method):
    """Student, momentum teacher and queue; `forward` is one training step's loss.

    Args:
        config: see ReSSLConfig.
        mean, std: of the training images in [0, 1], by channel, [3].
    """

    def __init__(self, config: ReSSLConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.config = config
        backbone, width = build(config.arch, config.stem, config.bn_splits)
        projector = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.dim),
        )
        self.student = nn.ModuleDict({"backbone": backbone, "projector": projector})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.queue = FeatureQueue(config.queue_size, config.dim, dtype=getattr(torch, config.queue_dtype))
        views = config.image_size, mean, std, config.crop_min, config.flip
        self.strong, self.weak = Augment(*views, strong=True), Augment(*views, strong=False)
        self.standardise = Standardise(mean, std)

    @property
    def backbone(self) -> nn.Module:
        """The encoder to keep: the student's, without its projector."""
        return self.student["backbone"]

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of uint8 images [B, 3, H, W], and the teacher's entropy.

        The teacher moves before its forward pass, the loss sees the old queue, and the keys are enqueued
        before backward.
        """
        q = _embed(self.student, self.strong(images))
        self.update_teacher()
        k = self.keys(self.weak(images))
        loss, entropy = relation_loss(
            q,
            k,
            self.queue,
            student_temperature=self.config.student_temperature,
            teacher_temperature=self.config.teacher_temperature,
            return_entropy=True,
            backend=self.config.backend,
        )
        self.queue.enqueue(k)
        return loss, {"teacher_entropy": entropy}

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Parameters only: the teacher's BatchNorm keeps statistics of its own, as in the authors' code."""
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            teacher.lerp_(student, 1 - self.config.momentum)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Teacher embeddings [B, D]. Shuffled, so that BatchNorm's splits differ from the student's."""
        if self.config.bn_splits == 1:
            return _embed(self.teacher, images)
        order = torch.randperm(len(images), device=images.device)
        return _embed(self.teacher, images[order])[order.argsort()]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features [B, width] of uint8 images [B, 3, H, W] before the projector."""
        images = images.to(self.queue.rows.device)
        return self.backbone(self.standardise(images.float() / 255))


def _embed(encoder: nn.ModuleDict, images: Tensor) -> Tensor:
    """Unit-norm embeddings [B, D], normalised in float32 whatever the autocast dtype."""
    return F.normalize(encoder["projector"](encoder["backbone"](images)).float(), dim=1)
