"""What ReSSL, MoCo and distillation share: a student, and a queue of a teacher's embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.augment import Normalize, View
from relssl.methods.base import Method, TrainConfig, at_least_float32
from relssl.queue import FeatureQueue

# Steps of the strong view: MoCo v2's, and ReSSL's of the student.
STRONG: dict[str, Any] = {"jitter": (0.4, 0.4, 0.4, 0.1), "grey": 0.2, "blur": 0.5}


@dataclass
class StudentConfig(TrainConfig):
    """Settings of a student with a teacher. In brackets: where a default comes from."""

    crop_min: float = 0.2
    """Smallest share of an image's area in a crop, in all views. [ReSSL, MoCo, CompRess: 0.2; digits 0.5]"""
    flip: bool = True
    """Horizontal flips in all views. [ReSSL, MoCo, CompRess; not for digits]"""

    def validate(self) -> None:
        super().validate()
        if not self.queue_size:
            raise ValueError("queue_size must be at least 1 with a teacher, got 0")


class StudentMethod(Method):
    """A student, and a queue of the teacher's embeddings, which `encode` returns first.

    The loss is computed with the old queue; then the embeddings are enqueued.

    Args:
        config: see StudentConfig.
        student: the backbone and its projector.
        dim: width D of the embeddings.
        mean, std: statistics of the training images in [0, 1], by channel, [3].
    """

    compares_images = False
    config: StudentConfig
    queue: FeatureQueue

    def __init__(
        self, config: StudentConfig, student: "ProjectedEncoder", dim: int, mean: Tensor, std: Tensor
    ) -> None:
        super().__init__()
        self.config, self.student = config, student
        self.queue = config.build_queue(dim)
        self.normalize = Normalize(mean, std)

    def view(self, side: float = 1.0, **steps: Any) -> View:
        """Builds a view whose side and areas of crops are a share of the largest ones."""
        size, scale = round(self.config.image_size * side), (self.config.crop_min * side, side)
        return View(size, scale=scale, flip=0.5 * self.config.flip, **steps)

    @property
    def backbone(self) -> nn.Module:
        """The student's backbone, without its projector."""
        return self.student["backbone"]

    def update_queue(self, outputs: Sequence[Tensor], ids: Tensor | None = None) -> None:
        self.queue.enqueue(outputs[0], ids)


class ProjectedEncoder(nn.ModuleDict):
    """A backbone and its projector."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__({"backbone": backbone, "projector": projector})

    def forward(self, images: Tensor) -> Tensor:
        return self["projector"](self["backbone"](images))


@torch.no_grad()
def agreement(q: Tensor, k: Tensor) -> Tensor:
    """Computes the mean cosine of queries [B, D] or [V, B, D] and their keys [B, D], all of norm 1."""
    return torch.dot(q.flatten(), k.expand_as(q).flatten()) / (q.numel() // k.shape[1])


def embed(encoder: nn.Module, images: Tensor, predictor: nn.Module | None = None) -> Tensor:
    """Computes unit-norm embeddings [B, D]."""
    z = encoder(images)
    return F.normalize(at_least_float32(predictor(z) if predictor else z), dim=1)
