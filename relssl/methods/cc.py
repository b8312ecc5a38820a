"""Contrastive Clustering (CC): SimCLR's loss between images, and a like loss between clusters.

Li et al., Contrastive Clustering, AAAI 2021. Heads, losses, augmentations and defaults are those of the
authors' code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from relssl.datasets import ConcatImages, Data, Images
from relssl.groups import Group
from relssl.methods.base import at_least_float32
from relssl.methods.simclr import SimCLR, SimCLRConfig
from relssl.nn import ClusterLoss


@dataclass
class CCConfig(SimCLRConfig):
    """Train CC. In brackets: where a default comes from. The defaults shown are those of the preset."""

    clusters: int = 0
    """Clusters M; 0: as many as the data set has classes. Needed if it has no labels. [CC, SACC: as many]"""
    sigma: float = 1.0
    """Weight of the cluster losses, sigma. [CC: 1; SACC: 1, 0.5 on CIFAR-100]"""
    cluster_temperature: float = 1.0
    """Temperature of the cluster loss. [CC, SACC]"""
    recipe: Literal["joint", "stl10"] = "joint"
    """joint: all losses on all images. stl10: in every epoch the instance losses on the unlabelled images,
    then instance and cluster losses on the others. [CC, SACC: stl10 on STL-10]"""
    test_images: bool = True
    """Train on the test images, too, without their labels. [CC, SACC: yes; ImageNet subsets have none]"""
    normalize: Literal["all", "none"] = "none"
    """Whether views are normalised by the data set's mean and deviation. [CC: none]"""

    def build(self, mean: Tensor, std: Tensor) -> "CC":
        return CC(self, mean, std)

    def resolve(self, data: Data) -> "CCConfig":
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


# The settings that CC and SACC share, by data set.
PAPER: dict[str, Any] = dict(
    arch="resnet34", stem="imagenet", image_size=224, epochs=1000, optimizer="adam", lr=3e-4,
    schedule="constant", warmup_epochs=0, weight_decay=0.0, queue_size=0,
)  # fmt: skip
_IMAGENET: dict[str, Any] = dict(data="folder", jitter=1.0, blur=True, test_images=False)
BY_DATA: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "cifar20": dict(data="cifar20"),
    "stl10": dict(data="stl10", recipe="stl10", jitter=1.0),
    "imagenet-10": _IMAGENET | dict(classes="imagenet-10"),
    "imagenet-dogs": _IMAGENET | dict(classes="imagenet-dogs"),
    "arrays": dict(data="arrays"),
    "folder": _IMAGENET,
    # relssl's own, which takes minutes on a CPU: 1,797 small grey images.
    "digits": dict(
        data="digits", arch="conv4", image_size=16, epochs=60, batch_size=128, lr=1e-3,
        schedule="cosine", crop_min=0.5, flip=False, normalize="all",
    ),
}  # fmt: skip
PRESETS = {name: CCConfig(**(PAPER | settings)) for name, settings in BY_DATA.items()}


class CC(SimCLR):
    """A backbone with an instance and a cluster head; `forward` computes the loss of one training step.

    Args:
        config: see CCConfig.
        mean, std: statistics of the training images in [0, 1], by channel, [3].
    """

    default_pass = "joint"
    config: CCConfig

    def __init__(self, config: CCConfig, mean: Tensor, std: Tensor) -> None:
        if config.clusters < 2:
            raise ValueError(f"clusters must be at least 2, got {config.clusters}")
        super().__init__(config, mean, std)
        self.cluster = self.head(config.clusters)
        self.cluster_loss = ClusterLoss(
            temperature=config.cluster_temperature, backend=config.backend, group=Group()
        )

    @property
    def networks(self) -> list[nn.Module]:
        return [*super().networks, self.cluster]

    def encode(self, views: Sequence[Tensor], pass_name: str = "joint") -> tuple[Tensor, ...]:
        """Computes embeddings [B, D] of each view and, except in "instance", assignments [B, M]."""
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
        views = len(self.views)
        loss = self.instance_losses(outputs[:views], pass_name, ids)
        logs = {"instance_loss": loss}
        if pass_name != "instance":
            logs["cluster_loss"] = self.cluster_losses(outputs[views:], pass_name)
            loss = loss + logs["cluster_loss"] * (self.config.sigma if pass_name == "joint" else 1.0)
        return loss, logs

    def instance_losses(
        self, views: Sequence[Tensor], pass_name: str = "joint", ids: Tensor | None = None
    ) -> Tensor:
        """Computes L_I(v1, v2) of unit-norm embeddings [B, D]. ids: see `Method.forward`."""
        return self.nt_xent(*views, self.queue, ids)

    def cluster_losses(self, views: Sequence[Tensor], pass_name: str = "joint") -> Tensor:
        """Computes L_C(v1, v2), with the entropy terms, of soft assignments [B, M]."""
        return self.cluster_loss(*views)

    def assign(self, features: Tensor) -> Tensor:
        return at_least_float32(self.cluster(features)).softmax(1)
