"""MoCo: a student tells the momentum teacher's embedding of the other view from past embeddings.

He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020, with the projector,
views and temperature of MoCo v2 (Chen et al., Improved Baselines with Momentum Contrastive Learning, 2020).
A baseline: encoders, optimizer and all other settings are those of ReSSL's presets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from relssl.functional import info_nce
from relssl.methods import ressl
from relssl.methods.base import settings_of
from relssl.methods.momentum import MomentumConfig, MomentumMethod
from relssl.methods.student import STRONG, agreement, embed


@dataclass
class MoCoConfig(MomentumConfig):
    """Train MoCo. In brackets: where a default comes from. The defaults shown are those of the preset."""

    temperature: float = 0.2
    """Temperature of InfoNCE. [MoCo v2]"""

    def build(self, mean: Tensor, std: Tensor) -> "MoCo":
        return MoCo(self, mean, std)


PRESETS = {name: MoCoConfig(**settings_of(preset, MoCoConfig)) for name, preset in ressl.PRESETS.items()}


class MoCo(MomentumMethod):
    """Two strong views, the first for the student, the second for the teacher.

    Args:
        config: see MoCoConfig.
        mean, std: statistics of the training images in [0, 1], by channel, [3].
    """

    config: MoCoConfig

    def __init__(self, config: MoCoConfig, mean: Tensor, std: Tensor) -> None:
        super().__init__(config, mean, std)
        self.temperatures = {"student": config.temperature}
        self.strong = self.view(normalize=self.normalize, **STRONG)

    @property
    def views(self) -> list[nn.Module]:
        return [self.strong, self.strong]

    def encode(self, views: Sequence[Tensor], pass_name: str = "train") -> tuple[Tensor, ...]:
        """Computes unit-norm embeddings [B, D]: keys of the second view, and queries of the first."""
        return self.keys(views[1]), embed(self.student, views[0])

    def loss(
        self, outputs: Sequence[Tensor], pass_name: str = "train", ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes InfoNCE over the queue, and the agreement of student and teacher."""
        (k, q), config = outputs, self.config
        loss = info_nce(q, k, self.queue, temperature=config.temperature, ids=ids, backend=config.backend)
        return loss, {"agreement": agreement(q, k)}
