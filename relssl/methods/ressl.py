"""ReSSL: a student learns the teacher's similarities of an image to past embeddings, from a stronger view.

Zheng et al., ReSSL: Relational Self-Supervised Learning with Weak Augmentation, NeurIPS 2021. The steps
and defaults are those of the authors' code.

The journal version (Weak Augmentation Guided Relational Self-Supervised Learning, 2022, arXiv 2203.08717)
adds a predictor and an InfoNCE warm-up, of which no code is public. Here the predictor, behind the
student's projector, is BYOL's (Grill et al. 2020: linear, BatchNorm, ReLU, linear) added to its input, and
the loss is w * InfoNCE + (1 - w) * relation with a w that falls linearly to zero; InfoNCE's positive is the
weak view of the same image.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.augment import Normalize, View
from relssl.distributed import broadcast, rank, world_size
from relssl.functional import info_nce, relation_loss
from relssl.groups import Group, all_gather
from relssl.methods.backbones import build
from relssl.methods.base import Method, TrainConfig, at_least_float32
from relssl.queue import FeatureQueue

# Sides of the student's crops, as shares of the image's; also the largest shares of its area.
CROPS = tuple(side / 224 for side in (224, 192, 160, 128, 96))


@dataclass
class ReSSLConfig(TrainConfig):
    """Train ReSSL. In brackets: where a default comes from. The defaults shown are those of the preset."""

    dim: int = 128
    """Width D of the embeddings. [ReSSL: 128 on small data sets, 512 on ImageNet]"""
    hidden: int = 2048
    """Hidden width of the projector. [ReSSL: 2048 on small data sets, 4096 on ImageNet]"""
    momentum: float = 0.99
    """Momentum m of the teacher's moving average. [ReSSL: 0.99 CIFAR, 0.996 STL-10, 0.999 ImageNet]"""
    student_temperature: float = 0.1
    """Temperature of the student's softmax. [ReSSL]"""
    teacher_temperature: float = 0.04
    """Temperature of the teacher's softmax. [ReSSL]"""
    bn_splits: int = 8
    """Parts of a batch with separate BatchNorm statistics, on one GPU. [ReSSL: 8 on small data sets]"""
    crop_min: float = 0.2
    """Smallest share of an image's area in a crop, in both views. [ReSSL: 0.2; digits 0.5]"""
    flip: bool = True
    """Horizontal flips in both augmentations. [ReSSL; not for digits]"""
    crops: Literal[1, 2, 3, 4, 5] = 1
    """Student views, with sides of 224, 192, 160, 128 and 96 224ths of image_size. [ReSSL: 1 or 5]"""
    predictor: int = 0
    """Hidden width of the student's predictor, 0 for none. [ReSSL, journal version: has one]"""
    info_nce_epochs: int = 0
    """Epochs of the warm-up, in which InfoNCE is part of the loss. [ReSSL, journal version: has one]"""
    info_nce_weight: float = 1.0
    """Weight w of InfoNCE at the start, from 0 to 1; that of the relation loss is 1 - w. [relssl]"""
    info_nce_decay: Literal["linear", "none"] = "linear"
    """How the weight decays: linearly to zero within these epochs, or at their end. [relssl]"""
    info_nce_temperature: float = 0.2
    """Temperature of InfoNCE. [MoCo v2]"""

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
    # relssl's own, which takes minutes on a CPU: 1,437 small grey images.
    "digits": replace(
        _SMALL, data="digits", image_size=16, arch="conv4", hidden=512, queue_size=1024, epochs=20,
        warmup_epochs=1, batch_size=64, bn_splits=1, crop_min=0.5, flip=False,
    ),
}  # fmt: skip
PRESETS["imagenet"] = PRESETS["folder"]


class ReSSL(Method):
    """Student, momentum teacher and queue; `forward` computes the loss of one training step.

    The teacher is updated before its forward pass, the loss is computed with the old queue, and the keys are
    enqueued before backward.

    Args:
        config: see ReSSLConfig.
        mean, std: statistics of the training images in [0, 1], by channel, [3].
    """

    compares_images = False
    queue: FeatureQueue

    def __init__(self, config: ReSSLConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.config: ReSSLConfig = config
        self.temperatures = {"teacher": config.teacher_temperature, "student": config.student_temperature}
        backbone, width = build(config.arch, config.stem, config.bn_splits)
        projector = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.dim),
        )
        self.student = _Encoder({"backbone": backbone, "projector": projector})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.predictor = Predictor(config.dim, config.predictor) if config.predictor else nn.Identity()
        self.queue = config.build_queue(config.dim)
        self.normalize = Normalize(mean, std)
        self.weak = self._view(1.0)
        self.strong = nn.ModuleList(
            self._view(side, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5)
            for side in CROPS[: config.crops]
        )

    def _view(self, side: float, **steps: Any) -> View:
        """Builds a view whose side and areas of crops are a share of the largest ones."""
        size, scale = round(self.config.image_size * side), (self.config.crop_min * side, side)
        return View(size, scale=scale, flip=0.5 * self.config.flip, normalize=self.normalize, **steps)

    @property
    def backbone(self) -> nn.Module:
        """The student's backbone, without its projector."""
        return self.student["backbone"]

    @property
    def networks(self) -> list[nn.Module]:
        return [self.student, self.teacher, *([self.predictor] if self.config.predictor else [])]

    @property
    def views(self) -> list[nn.Module]:
        """The teacher's view and the student's."""
        return [self.weak, *self.strong]

    def encode(self, views: Sequence[Tensor], pass_name: str = "train") -> tuple[Tensor, ...]:
        """Computes unit-norm embeddings [B, D]: keys of the teacher's view, and queries of the others."""
        weak, *strong = views
        return self.keys(weak), *(_embed(self.student, view, self.predictor) for view in strong)

    def loss(
        self, outputs: Sequence[Tensor], pass_name: str = "train", ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss with the queue, the teacher's entropy and, in the warm-up, InfoNCE.

        The teacher's softmax is computed once for all crops.
        """
        config, backend = self.config, self.config.backend
        k, *queries = outputs
        q = torch.stack(queries) if len(queries) > 1 else queries[0]
        loss, entropy = relation_loss(
            q,
            k,
            self.queue,
            student_temperature=config.student_temperature,
            teacher_temperature=config.teacher_temperature,
            return_entropy=True,
            ids=ids,
            backend=backend,
        )
        logs = {"teacher_entropy": entropy}
        if weight := self.info_nce_weight():
            tau = config.info_nce_temperature
            warm_up = info_nce(q, k, self.queue, temperature=tau, ids=ids, backend=backend)
            loss, logs["info_nce"] = weight * warm_up + (1 - weight) * loss, warm_up
        return loss, logs

    def update_queue(self, outputs: Sequence[Tensor], ids: Tensor | None = None) -> None:
        self.queue.enqueue(outputs[0], ids)

    def info_nce_weight(self) -> float:
        """Computes InfoNCE's weight w at the current epoch."""
        config = self.config
        if self.epoch >= config.info_nce_epochs:
            return 0.0
        left = 1 - self.epoch / config.info_nce_epochs
        return config.info_nce_weight * (left if config.info_nce_decay == "linear" else 1.0)

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
            return _embed(self.teacher, images)
        order = broadcast(torch.randperm(world_size() * len(images), device=images.device))
        own = slice(rank() * len(images), (rank() + 1) * len(images))
        everyone = Group()
        keys = all_gather(_embed(self.teacher, all_gather(images, everyone)[order[own]]), everyone)
        return keys[order.argsort()[own]]

    def prepare(self, images: Tensor) -> Tensor:
        return self.normalize(super().prepare(images))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return _embed(self.teacher, self.prepare(images))


class Predictor(nn.Module):
    """Computes z + mlp(z) of unit-norm z [B, D]: BYOL's layers, with a residual connection.

    The last layer starts at zero, so training starts as without a predictor. Without the residual connection,
    training collapses: the teacher, which has no predictor, maps all images to one point (docs/results.md).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), last)

    def forward(self, z: Tensor) -> Tensor:
        z = F.normalize(z, dim=1)
        return z + self.mlp(z)


class _Encoder(nn.ModuleDict):
    """A backbone and its projector."""

    def forward(self, images: Tensor) -> Tensor:
        return self["projector"](self["backbone"](images))


def _embed(encoder: nn.Module, images: Tensor, predictor: nn.Module | None = None) -> Tensor:
    """Computes unit-norm embeddings [B, D]."""
    z = encoder(images)
    return F.normalize(at_least_float32(predictor(z) if predictor else z), dim=1)
