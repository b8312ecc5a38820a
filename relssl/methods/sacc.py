"""SACC: contrastive clustering of two weak views and a strong one, with losses over images and clusters.

Deng et al., Strongly Augmented Contrastive Clustering, 2022 (arXiv 2206.00380), on Contrastive Clustering
(Li et al., AAAI 2021). Heads, losses, augmentations and defaults are those of the authors' code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.augment import Normalize, RandAugment, View
from relssl.datasets import ConcatImages, Data, Images
from relssl.groups import Group
from relssl.methods.backbones import build
from relssl.methods.base import Method, TrainConfig, at_least_float32
from relssl.nn import ClusterLoss, NTXentLoss

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # Mean and standard deviation by channel.


@dataclass
class SACCConfig(TrainConfig):
    """Train SACC. In brackets: where a default comes from. The defaults shown are those of the preset."""

    clusters: int = 0
    """Clusters M; 0: as many as the data set has classes. Needed if it has no labels. [SACC: as many]"""
    dim: int = 128
    """Width D of the instance embeddings. [SACC]"""
    sigma: float = 1.0
    """Weight of the cluster losses, sigma. [SACC: 1; 0.5 on CIFAR-100]"""
    instance_temperature: float = 0.5
    """Temperature of the instance loss. [SACC]"""
    cluster_temperature: float = 1.0
    """Temperature of the cluster loss. [SACC]"""
    recipe: Literal["joint", "stl10"] = "joint"
    """joint: all losses on all images. stl10: in every epoch the instance losses on the unlabelled images,
    then instance and cluster losses on the others, with other pairs of views. [SACC: stl10 on STL-10]"""
    test_images: bool = True
    """Train on the test images, too, without their labels. [SACC: yes; ImageNet subsets have none]"""
    crop_min: float = 0.08
    """Smallest share of an image's area in a crop, in all views. [SACC: 0.08; digits 0.5]"""
    flip: bool = True
    """Horizontal flips in all views. [SACC; not for digits]"""
    weak_jitter: float = 0.5
    """Strength s of the weak views' colour jitter (0.8s, 0.8s, 0.8s, 0.2s). [SACC: 0.5 on CIFAR, else 1]"""
    weak_blur: bool = False
    """Blur in the weak views. [SACC: on the ImageNet subsets]"""
    randaugment: int = 5
    """Operations of the strong view's RandAugment. [SACC]"""
    normalize: Literal["strong", "all"] = "strong"
    """strong: only the strong view, by ImageNet's mean and deviation. all: every view, by the data set's.
    [SACC: strong]"""

    def build(self, mean: Tensor, std: Tensor) -> "SACC":
        return SACC(self, mean, std)

    def resolve(self, data: Data) -> "SACCConfig":
        if not self.clusters and not data.classes:
            raise ValueError(f"data {self.data!r} has no classes to count: set the number of --clusters")
        return replace(self, clusters=self.clusters or len(data.classes))

    def passes(self, data: Data) -> dict[str, Images]:
        test = data.test if self.test_images else None
        images = data.eval_train if test is None else ConcatImages(data.eval_train, test)
        if self.recipe == "joint":
            return {"joint": data.train if test is None else images}
        if data.unlabelled is None or data.labelled is None:
            missing = "unlabelled" if data.unlabelled is None else "labelled"
            raise ValueError(f"recipe stl10 needs {missing} images, which data {self.data!r} lacks")
        return {"instance": data.unlabelled, "cluster": images}

    @property
    def clusters_test_images(self) -> bool:
        return self.test_images


_PAPER = SACCConfig(
    arch="resnet34", stem="imagenet", image_size=224, epochs=1000, batch_size=200, optimizer="adam", lr=3e-4,
    schedule="constant", warmup_epochs=0, weight_decay=0.0, queue_size=0,
)  # fmt: skip
_IMAGENET = replace(_PAPER, data="folder", weak_jitter=1.0, weak_blur=True, test_images=False)
PRESETS = {
    "cifar10": _PAPER,
    "cifar20": replace(_PAPER, data="cifar20", sigma=0.5),
    "stl10": replace(_PAPER, data="stl10", recipe="stl10", weak_jitter=1.0),
    "imagenet-10": replace(_IMAGENET, classes="imagenet-10"),
    "imagenet-dogs": replace(_IMAGENET, classes="imagenet-dogs"),
    "arrays": replace(_PAPER, data="arrays"),
    "folder": _IMAGENET,
    # relssl's own, which takes minutes on a CPU: 1,797 small grey images.
    "digits": replace(
        _PAPER, data="digits", arch="conv4", image_size=16, epochs=60, batch_size=128, lr=1e-3,
        schedule="cosine", crop_min=0.5, flip=False, normalize="all",
    ),
}  # fmt: skip


class SACC(Method):
    """A backbone with an instance and a cluster head; `forward` computes the loss of one training step.

    Args:
        config: see SACCConfig.
        mean, std: statistics of the training images in [0, 1], by channel, [3].
    """

    compares_images = True
    default_pass = "joint"

    def __init__(self, config: SACCConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        if config.clusters < 2:
            raise ValueError(f"clusters must be at least 2, got {config.clusters}")
        self.config: SACCConfig = config
        self.temperatures = {"instance": config.instance_temperature}
        self.net, width = build(config.arch, config.stem)
        self.instance = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, config.dim)
        )
        self.cluster = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, config.clusters)
        )
        # Over the images of all processes.
        backend, everyone = config.backend, Group()
        self.nt_xent = NTXentLoss(temperature=config.instance_temperature, backend=backend, group=everyone)
        self.cluster_loss = ClusterLoss(
            temperature=config.cluster_temperature, backend=backend, group=everyone
        )
        self.queue = config.build_queue(config.dim) if config.queue_size else None
        published = config.normalize == "strong"
        self.normalize = nn.Identity() if published else Normalize(mean, std)
        flip = 0.5 * config.flip
        view = partial(View, config.image_size, scale=(config.crop_min, 1.0), flip=flip, grey=0.2)
        s = config.weak_jitter
        self.weak = view(
            jitter=(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s),
            blur=0.5 * config.weak_blur,
            normalize=self.normalize,
        )
        self.strong = view(
            jitter=(0.4, 0.4, 0.4, 0.1),
            blur=0.5,
            randaugment=RandAugment(config.randaugment) if config.randaugment else None,
            normalize=Normalize(*IMAGENET) if published else self.normalize,
        )

    @property
    def backbone(self) -> nn.Module:
        return self.net

    @property
    def networks(self) -> list[nn.Module]:
        return [self.net, self.instance, self.cluster]

    @property
    def views(self) -> list[nn.Module]:
        return [self.weak, self.weak, self.strong]

    def encode(self, views: Sequence[Tensor], pass_name: str = "joint") -> tuple[Tensor, ...]:
        """Computes embeddings [B, D] of the three views and, except in "instance", assignments [B, M]."""
        features = [self.net(view) for view in views]
        assigned = () if pass_name == "instance" else map(self.assign, features)
        return *map(self.embedding, features), *assigned

    def loss(
        self, outputs: Sequence[Tensor], pass_name: str = "joint", ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss and its parts, those over instances and over clusters.

        The passes "instance" and "cluster" are those of the recipe for STL-10; the former has no cluster
        loss.
        """
        loss = self.instance_losses(outputs[:3], pass_name, ids)
        logs = {"instance_loss": loss}
        if pass_name != "instance":
            logs["cluster_loss"] = self.cluster_losses(outputs[3:], pass_name)
            loss = loss + logs["cluster_loss"] * (self.config.sigma if pass_name == "joint" else 1.0)
        return loss, logs

    def update_queue(self, outputs: Sequence[Tensor], ids: Tensor | None = None) -> None:
        """Enqueues the embeddings of the second view."""
        if self.queue is not None:
            self.queue.enqueue(outputs[1].detach(), ids)

    def instance_losses(
        self, views: Sequence[Tensor], pass_name: str = "joint", ids: Tensor | None = None
    ) -> Tensor:
        """Computes L_I(w1, w2) + L_I(w2, s), the latter of (w1, s) in the recipe for STL-10.

        views: unit-norm embeddings [B, D] of the weak views and the strong one. ids: see `Method.forward`.
        """
        w1, w2, s = views
        weak = w2 if pass_name == "joint" else w1
        return self.nt_xent(w1, w2, self.queue, ids) + self.nt_xent(weak, s, self.queue, ids)

    def cluster_losses(self, views: Sequence[Tensor], pass_name: str = "joint") -> Tensor:
        """Computes L_C(w1, w2) + L_C(w1, s) + L_C(w2, s), without the last in the recipe for STL-10.

        Each L_C includes the entropy terms of its two views.

        views: soft assignments [B, M] of the weak views and the strong one.
        """
        w1, w2, s = views
        loss = self.cluster_loss(w1, w2) + self.cluster_loss(w1, s)
        return loss + self.cluster_loss(w2, s) if pass_name == "joint" else loss

    def embedding(self, features: Tensor) -> Tensor:
        """Computes unit-norm instance embeddings [B, D]."""
        return F.normalize(at_least_float32(self.instance(features)), dim=1)

    def assign(self, features: Tensor) -> Tensor:
        return at_least_float32(self.cluster(features)).softmax(1)

    def prepare(self, images: Tensor) -> Tensor:
        return self.normalize(super().prepare(images))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return self.embedding(self.features(images))
