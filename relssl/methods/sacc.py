"""SACC: Contrastive Clustering with a third, strong view.

Deng et al., Strongly Augmented Contrastive Clustering, 2022 (arXiv 2206.00380), on Contrastive Clustering
(Li et al., AAAI 2021). Heads, losses, augmentations and defaults are those of the authors' code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from relssl.augment import Normalize, RandAugment
from relssl.methods.cc import BY_DATA, CC, PAPER, CCConfig

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # Mean and standard deviation by channel.


@dataclass
class SACCConfig(CCConfig):
    """Train SACC. In brackets: where a default comes from. The defaults shown are those of the preset.

    jitter and blur are those of the two weak views. The recipe stl10 also has other pairs of views.
    """

    randaugment: int = 5
    """Operations of the strong view's RandAugment. [SACC]"""
    normalize: Literal["strong", "all"] = "strong"  # type: ignore[assignment]
    """strong: only the strong view, by ImageNet's mean and deviation. all: every view, by the data set's.
    [SACC: strong]"""

    def build(self, mean: Tensor, std: Tensor) -> "SACC":
        return SACC(self, mean, std)


_SACC: dict[str, dict[str, Any]] = {"cifar20": dict(sigma=0.5)}
PRESETS = {
    name: SACCConfig(**(PAPER | dict(batch_size=200) | settings | _SACC.get(name, {})))
    for name, settings in BY_DATA.items()
}


class SACC(CC):
    """Two weak views and a strong one.

    Args:
        config: see SACCConfig.
        mean, std: statistics of the training images in [0, 1], by channel, [3].
    """

    config: SACCConfig

    def __init__(self, config: SACCConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__(config, mean, std)
        self.strong = self.view(
            jitter=(0.4, 0.4, 0.4, 0.1),
            blur=0.5,
            randaugment=RandAugment(config.randaugment) if config.randaugment else None,
            normalize=Normalize(*IMAGENET) if config.normalize == "strong" else self.normalize,
        )

    @property
    def views(self) -> list[nn.Module]:
        return [self.weak, self.weak, self.strong]

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
