"""Relational distillation: a student learns a frozen teacher's similarities of an image to past images.

The relation loss with another teacher: Koohpayegani et al., CompRess: Self-Supervised Learning by Compressing
Representations, NeurIPS 2020, with one queue, the teacher's; Fang et al., SEED: Self-Supervised Distillation
for Visual Representation, ICLR 2021. Student and teacher see the same view, as in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from relssl.datasets import Data
from relssl.functional import relation_loss
from relssl.methods import ressl
from relssl.methods.base import settings_of
from relssl.methods.student import STRONG, ProjectedEncoder, StudentConfig, StudentMethod, agreement, embed
from relssl.methods.teacher import Teacher, absolute


@dataclass
class DistillConfig(StudentConfig):
    """Distil a frozen encoder. In brackets: where a default comes from. The defaults are the preset's."""

    teacher: str = ""
    """Encoder to distil: a checkpoint of relssl train, or timm/NAME with timm's pretrained weights."""
    dim: int | None = None
    """Width D of the teacher's features, and so of the student's head. Default: as the teacher has it."""
    student_temperature: float = 0.04
    """Temperature of the student's softmax. [CompRess: 0.04; SEED: 0.2]"""
    teacher_temperature: float = 0.04
    """Temperature of the teacher's softmax. [CompRess: 0.04; SEED: 0.01]"""
    form: Literal["kl", "ce"] = "kl"
    """Loss: the divergence or the cross entropy of the softmaxes, which have the same gradients.
    [CompRess: kl, SEED: ce]"""

    def build(self, mean: Tensor, std: Tensor) -> "Distill":
        return Distill(self, mean, std)

    def resolve(self, data: Data) -> "DistillConfig":
        if not self.teacher:
            raise ValueError("no teacher: set --teacher to a checkpoint of relssl train, or to timm/NAME")
        width = Teacher(self.teacher, self.image_size).width
        if self.dim not in (None, width):
            raise ValueError(f"teacher {self.teacher} has features of width {width}, but dim is {self.dim}")
        return replace(self, dim=width, teacher=absolute(self.teacher))


PRESETS = {name: DistillConfig(**settings_of(like, StudentConfig)) for name, like in ressl.PRESETS.items()}


class Distill(StudentMethod):
    """A student whose head has the teacher's width, and a queue of the teacher's features.

    config: see DistillConfig; dim is set. mean, std: see TrainConfig.build.
    """

    config: DistillConfig

    def __init__(self, config: DistillConfig, mean: Tensor, std: Tensor) -> None:
        assert config.dim is not None
        backbone, width = config.build_backbone()
        student = ProjectedEncoder(backbone, nn.Linear(width, config.dim))
        super().__init__(config, student, config.dim, mean, std)
        self.temperatures = {"teacher": config.teacher_temperature, "student": config.student_temperature}
        self.strong = self.view(**STRONG)
        self.loaded: list[Teacher] = []  # A list: checkpoints and DDP do not need its weights.

    @property
    def teacher(self) -> Teacher:
        """The teacher, which is loaded when training first needs it; evaluation does not."""
        if not self.loaded:
            device = next(self.parameters()).device
            teacher = Teacher(self.config.teacher, self.config.image_size)
            self.loaded.append(teacher.to(device=device, memory_format=torch.channels_last))  # type: ignore
        return self.loaded[0]

    def discard_compiled(self) -> None:
        super().discard_compiled()
        for teacher in self.loaded:
            teacher.__dict__.pop("forward", None)

    @property
    def networks(self) -> list[nn.Module]:
        return [self.student, self.teacher]

    @property
    def views(self) -> list[nn.Module]:
        return [self.strong]

    def encode(self, views: Sequence[Tensor], pass_name: str = "train") -> tuple[Tensor, ...]:
        """Computes unit-norm embeddings [B, D] of the view: the teacher's, and the student's."""
        with torch.no_grad():
            k = embed(self.teacher, views[0])
        return k, embed(self.student, self.normalize(views[0]))

    def loss(
        self, outputs: Sequence[Tensor], pass_name: str = "train", ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the relation loss with the queue, the teacher's entropy and the agreement."""
        config, (k, q) = self.config, outputs
        loss, entropy = relation_loss(
            q, k, self.queue, student_temperature=config.student_temperature,
            teacher_temperature=config.teacher_temperature, form=config.form, return_entropy=True, ids=ids,
            backend=config.backend,
        )  # fmt: skip
        return loss, {"teacher_entropy": entropy, "agreement": agreement(q, k)}

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Computes the student's unit-norm embeddings [B, D]; the queue holds the teacher's features."""
        return embed(self.student, self.prepare(images))
