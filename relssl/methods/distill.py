"""Relational distillation: a student learns a frozen teacher's similarities of an image to past images.

The relation loss with another teacher: Koohpayegani et al., CompRess: Self-Supervised Learning by Compressing
Representations, NeurIPS 2020, with one queue, the teacher's; Fang et al., SEED: Self-Supervised Distillation
for Visual Representation, ICLR 2021. Student and teacher see the same view, as in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from relssl.augment import Normalize, View
from relssl.datasets import Data
from relssl.functional import relation_loss
from relssl.methods import ressl
from relssl.methods.backbones import build
from relssl.methods.base import Method, TrainConfig, settings_of
from relssl.methods.momentum import STRONG, ProjectedEncoder, embed
from relssl.queue import FeatureQueue


@dataclass
class DistillConfig(TrainConfig):
    """Distil a frozen encoder. In brackets: where a default comes from. The defaults shown are those of the
    preset."""

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
    crop_min: float = 0.2
    """Smallest share of an image's area in a crop. [CompRess, SEED: 0.2; digits 0.5]"""
    flip: bool = True
    """Horizontal flips. [CompRess, SEED; not for digits]"""

    def build(self, mean: Tensor, std: Tensor) -> "Distill":
        return Distill(self, mean, std)

    def resolve(self, data: Data) -> "DistillConfig":
        if not self.teacher:
            raise ValueError("no teacher: set --teacher to a checkpoint of relssl train, or to timm/NAME")
        width = Teacher(self.teacher, self.image_size).width
        if self.dim not in (None, width):
            raise ValueError(f"teacher {self.teacher} has features of width {width}, but dim is {self.dim}")
        return replace(self, dim=width)


PRESETS = {
    name: DistillConfig(**settings_of(preset, TrainConfig), crop_min=preset.crop_min, flip=preset.flip)
    for name, preset in ressl.PRESETS.items()
}


class Teacher(nn.Module):
    """Computes a frozen encoder's features [B, width] of images in [0, 1], [B, 3, H, W].

    Args:
        source: see DistillConfig.teacher.
        size: side of the images, for models that need it.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint or model.
    """

    def __init__(self, source: str, size: int) -> None:
        super().__init__()
        if source.startswith("timm/"):
            raise NotImplementedError  # TODO
        from relssl.checkpoint import load_method

        with torch.random.fork_rng(devices=[]):  # The random weights before the loaded ones draw nothing.
            method, _ = load_method(Path(source), "cpu")
        self.normalize, self.backbone = method.normalize, method.backbone
        self.eval().requires_grad_(False)
        self.width = self(torch.zeros(1, 3, size, size)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(self.normalize(images))


class Distill(Method):
    """A student whose head has the teacher's width, and a queue of the teacher's features.

    Args:
        config: see DistillConfig; dim is the teacher's width.
        mean, std: statistics of the training images in [0, 1], by channel, [3].
    """

    compares_images = False
    config: DistillConfig
    queue: FeatureQueue

    def __init__(self, config: DistillConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        assert config.dim is not None
        self.config = config
        self.temperatures = {"teacher": config.teacher_temperature, "student": config.student_temperature}
        backbone, width = build(config.arch, config.stem)
        projector = nn.Linear(width, config.dim)
        self.student = ProjectedEncoder({"backbone": backbone, "projector": projector})
        self.queue = config.build_queue(config.dim)
        self.normalize = Normalize(mean, std)
        scale = (config.crop_min, 1.0)
        self.view = View(config.image_size, scale=scale, flip=0.5 * config.flip, **STRONG)
        self.loaded: list[Teacher] = []  # A list: checkpoints and DDP do not need its weights.

    @property
    def teacher(self) -> Teacher:
        """The teacher, which is loaded when training first needs it; evaluation does not."""
        if not self.loaded:
            device = next(self.parameters()).device
            teacher = Teacher(self.config.teacher, self.config.image_size)
            self.loaded.append(teacher.to(device=device, memory_format=torch.channels_last))  # type: ignore
        return self.loaded[0]

    @property
    def backbone(self) -> nn.Module:
        """The student's backbone, without its head."""
        return self.student["backbone"]

    @property
    def networks(self) -> list[nn.Module]:
        return [self.student, self.teacher]

    @property
    def views(self) -> list[nn.Module]:
        return [self.view]

    def encode(self, views: Sequence[Tensor], pass_name: str = "train") -> tuple[Tensor, ...]:
        """Computes unit-norm embeddings [B, D] of the view: the teacher's, and the student's."""
        with torch.no_grad():
            k = embed(self.teacher, views[0])
        return k, embed(self.student, self.normalize(views[0]))

    def loss(
        self, outputs: Sequence[Tensor], pass_name: str = "train", ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the relation loss with the queue, and the teacher's entropy."""
        config, (k, q) = self.config, outputs
        loss, entropy = relation_loss(
            q, k, self.queue, student_temperature=config.student_temperature,
            teacher_temperature=config.teacher_temperature, form=config.form, return_entropy=True, ids=ids,
            backend=config.backend,
        )  # fmt: skip
        return loss, {"teacher_entropy": entropy}

    def update_queue(self, outputs: Sequence[Tensor], ids: Tensor | None = None) -> None:
        self.queue.enqueue(outputs[0], ids)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return embed(self.student, self.prepare(images))
