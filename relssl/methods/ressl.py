"""ReSSL: a student learns the teacher's similarities of an image to past embeddings, from a stronger view.

Zheng et al., ReSSL: Relational Self-Supervised Learning with Weak Augmentation, NeurIPS 2021. The steps
and defaults are those of the authors' code.

The journal version (Weak Augmentation Guided Relational Self-Supervised Learning, 2022, arXiv 2203.08717)
adds a predictor and an InfoNCE warm-up, of which no code is public. Here the predictor, behind the
student's projector, is BYOL's (Grill et al. 2020: linear, BatchNorm, ReLU, linear) added to its input, and
the loss is w * InfoNCE + (1 - w) * relation with a w that falls linearly to zero; InfoNCE's positive is the
weak view of the same image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.functional import info_nce, relation_loss
from relssl.methods.momentum import MomentumConfig, MomentumMethod
from relssl.methods.student import STRONG, agreement, embed

# Sides of the student's crops, as shares of the image's; also the largest shares of its area.
CROPS = tuple(side / 224 for side in (224, 192, 160, 128, 96))


@dataclass
class ReSSLConfig(MomentumConfig):
    """Train ReSSL. In brackets: where a default comes from. The defaults shown are those of the preset."""

    student_temperature: float = 0.1
    """Temperature of the student's softmax. [ReSSL]"""
    teacher_temperature: float = 0.04
    """Temperature of the teacher's softmax. [ReSSL]"""
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

    @property
    def sides(self) -> tuple[int, ...]:
        return self.image_size, *(round(self.image_size * side) for side in CROPS[1 : self.crops])

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


class ReSSL(MomentumMethod):
    """A teacher that sees a weak view, and a student that sees one or several stronger ones.

    Args:
        config: see ReSSLConfig.
        mean, std: statistics of the training images in [0, 1], by channel, [3].
    """

    config: ReSSLConfig

    def __init__(self, config: ReSSLConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__(config, mean, std)
        self.temperatures = {"teacher": config.teacher_temperature, "student": config.student_temperature}
        self.predictor = Predictor(config.dim, config.predictor) if config.predictor else nn.Identity()
        self.weak = self.view(normalize=self.normalize)
        self.strong = nn.ModuleList(
            self.view(side, normalize=self.normalize, **STRONG) for side in CROPS[: config.crops]
        )

    @property
    def networks(self) -> list[nn.Module]:
        return [*super().networks, *([self.predictor] if self.config.predictor else [])]

    @property
    def views(self) -> list[nn.Module]:
        """The teacher's view and the student's."""
        return [self.weak, *self.strong]

    def encode(self, views: Sequence[Tensor], pass_name: str = "train") -> tuple[Tensor, ...]:
        """Computes unit-norm embeddings [B, D]: keys of the teacher's view, and queries of the others."""
        weak, *strong = views
        return self.keys(weak), *(embed(self.student, view, self.predictor) for view in strong)

    def loss(
        self, outputs: Sequence[Tensor], pass_name: str = "train", ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss with the queue, teacher entropy, agreement and, in the warm-up, InfoNCE.

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
        logs = {"teacher_entropy": entropy, "agreement": agreement(q, k)}
        if weight := self.info_nce_weight():
            tau = config.info_nce_temperature
            warm_up = info_nce(q, k, self.queue, temperature=tau, ids=ids, backend=backend)
            loss, logs["info_nce"] = weight * warm_up + (1 - weight) * loss, warm_up
        return loss, logs

    def info_nce_weight(self) -> float:
        """Computes InfoNCE's weight w at the current epoch."""
        config = self.config
        if self.epoch >= config.info_nce_epochs:
            return 0.0
        left = 1 - self.epoch / config.info_nce_epochs
        return config.info_nce_weight * (left if config.info_nce_decay == "linear" else 1.0)


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
