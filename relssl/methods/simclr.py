"""SimCLR: two views of an image attract each other, all other images of the batch repel them.

Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020: its projector,
views and loss. A baseline: encoders, optimizer and all other settings are those of ReSSL's presets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.augment import Normalize, View
from relssl.groups import Group
from relssl.methods import ressl
from relssl.methods.base import Method, TrainConfig, at_least_float32, settings_of
from relssl.nn import NTXentLoss


@dataclass
class SimCLRConfig(TrainConfig):
    """Train SimCLR. In brackets: where a default comes from. The defaults shown are those of the preset."""

    dim: int = 128
    """Width D of the instance embeddings. [SimCLR, CC, SACC]"""
    instance_temperature: float = 0.5
    """Temperature of the instance loss, NT-Xent. [SimCLR on CIFAR-10, CC, SACC]"""
    crop_min: float = 0.08
    """Smallest share of an image's area in a crop, in all views. [SimCLR, CC, SACC: 0.08; digits 0.5]"""
    flip: bool = True
    """Horizontal flips in all views. [SimCLR, CC, SACC; not for digits]"""
    jitter: float = 0.5
    """Strength s of the colour jitter (0.8s, 0.8s, 0.8s, 0.2s) of the two views. [SimCLR, CC, SACC: 0.5 on
    CIFAR, else 1]"""
    blur: bool = False
    """Blur in the two views. [SimCLR, CC, SACC: on ImageNet and its subsets]"""
    normalize: Literal["all", "none"] = "all"
    """Whether views are normalised by the data set's mean and deviation. [relssl: all; SimCLR: none]"""

    def build(self, mean: Tensor, std: Tensor) -> "SimCLR":
        return SimCLR(self, mean, std)


def _preset(like: TrainConfig) -> SimCLRConfig:
    config = replace(SimCLRConfig(**settings_of(like, SimCLRConfig)), queue_size=0)
    if config.data != "digits":
        config.crop_min = SimCLRConfig.crop_min
    config.jitter = 1.0 if config.image_size > 32 else 0.5
    config.blur = config.image_size > 64
    return config


PRESETS = {name: _preset(preset) for name, preset in ressl.PRESETS.items()}


class SimCLR(Method):
    """A backbone and an instance head.

    Args:
        config: see SimCLRConfig.
        mean, std: statistics of the training images in [0, 1], by channel, [3].
    """

    compares_images = True
    config: SimCLRConfig

    def __init__(self, config: SimCLRConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.config = config
        self.temperatures = {"instance": config.instance_temperature}
        self.net, self.width = config.build_backbone()
        self.instance = self.head(config.dim)
        self.nt_xent = NTXentLoss(  # over the images of all processes
            temperature=config.instance_temperature, backend=config.backend, group=Group()
        )
        self.queue = config.build_queue(config.dim) if config.queue_size else None
        self.normalize = Normalize(mean, std) if config.normalize == "all" else nn.Identity()
        s = config.jitter
        jitter = (0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
        self.weak = self.view(jitter=jitter, blur=0.5 * config.blur, normalize=self.normalize)

    def head(self, outputs: int) -> nn.Sequential:
        """Builds a head with the width of the features as its hidden width."""
        hidden = nn.Linear(self.width, self.width)
        return nn.Sequential(hidden, nn.ReLU(inplace=True), nn.Linear(self.width, outputs))

    def view(self, **steps: Any) -> View:
        config = self.config
        scale, flip = (config.crop_min, 1.0), 0.5 * config.flip
        return View(config.image_size, scale=scale, flip=flip, grey=0.2, **steps)

    @property
    def backbone(self) -> nn.Module:
        return self.net

    @property
    def networks(self) -> list[nn.Module]:
        return [self.net, self.instance]

    @property
    def views(self) -> list[nn.Module]:
        return [self.weak, self.weak]

    def encode(self, views: Sequence[Tensor], pass_name: str = "train") -> tuple[Tensor, ...]:
        """Computes embeddings [B, D] of each view."""
        return tuple(self.embedding(self.net(view)) for view in views)

    def loss(
        self, outputs: Sequence[Tensor], pass_name: str = "train", ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes NT-Xent of the two views; there is nothing else to log."""
        return self.nt_xent(*outputs, self.queue, ids), {}

    def update_queue(self, outputs: Sequence[Tensor], ids: Tensor | None = None) -> None:
        """Enqueues the embeddings of the second view."""
        if self.queue is not None:
            self.queue.enqueue(outputs[1].detach(), ids)

    def embedding(self, features: Tensor) -> Tensor:
        """Computes unit-norm instance embeddings [B, D]."""
        return F.normalize(at_least_float32(self.instance(features)), dim=1)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return self.embedding(self.features(images))
