"""What ReSSL and MoCo share: a teacher that is the student's moving average."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relssl.distributed import broadcast, rank, world_size
from relssl.groups import Group, all_gather
from relssl.methods.student import ProjectedEncoder, StudentConfig, StudentMethod, embed


@dataclass
class MomentumConfig(StudentConfig):
    """Settings of a student with a momentum teacher. In brackets: where a default comes from."""

    dim: int = 128
    """Width D of the embeddings. [ReSSL: 128 on small data sets, 512 on ImageNet; MoCo: 128]"""
    hidden: int = 2048
    """Hidden width of the projector. [ReSSL: 2048 on small data sets, 4096 on ImageNet; MoCo v2: 2048]"""
    momentum: float = 0.99
    """Momentum m of the teacher's moving average. [ReSSL: 0.99 CIFAR, 0.996 STL-10, 0.999 ImageNet; MoCo:
    0.999 ImageNet]"""
    bn_splits: int = 8
    """Parts of a batch with separate BatchNorm statistics, on one GPU; timm's models need 1, except
    ResNets. [ReSSL: 8 on small data sets]"""


class MomentumMethod(StudentMethod):
    """A student whose moving average is the teacher, which is updated before its forward pass.

    Args:
        config: see MomentumConfig.
        mean, std: statistics of the training images in [0, 1], by channel, [3].
    """

    config: MomentumConfig

    def __init__(self, config: MomentumConfig, mean: Tensor, std: Tensor) -> None:
        backbone, width = config.build_backbone()
        projector = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.dim),
        )
        super().__init__(config, ProjectedEncoder(backbone, projector), config.dim, mean, std)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    @property
    def networks(self) -> list[nn.Module]:
        return [self.student, self.teacher]

    def load_backbone(self, state: dict[str, Tensor], source: str) -> None:
        super().load_backbone(state, source)
        self.teacher.load_state_dict(self.student.state_dict())

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
            return embed(self.teacher, images)
        order = broadcast(torch.randperm(world_size() * len(images), device=images.device))
        own = slice(rank() * len(images), (rank() + 1) * len(images))
        everyone = Group()
        keys = all_gather(embed(self.teacher, all_gather(images, everyone)[order[own]]), everyone)
        return keys[order.argsort()[own]]

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        return embed(self.teacher, self.prepare(images))
