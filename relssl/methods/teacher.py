"""A frozen encoder to distil, of a checkpoint of relssl or a model of timm."""

from pathlib import Path

import torch
from torch import Tensor, nn

from relssl.augment import Normalize
from relssl.methods.initial import pretrained
from relssl.methods.timm_models import PREFIX, first_line


def absolute(source: str) -> str:
    """Returns the absolute path of a checkpoint, so that a run resumes from any folder."""
    return source if source.startswith(PREFIX) else str(Path(source).absolute())


class Teacher(nn.Module):
    """Computes a frozen encoder's features [B, width] of images in [0, 1], [B, 3, H, W].

    Args:
        source: a checkpoint of relssl train, or timm/NAME for timm's model with its pretrained weights.
        size: side H = W of the images.

    Attributes:
        width: number of features.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint or model, or it takes no such images.
    """

    def __init__(self, source: str, size: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # The random weights before the loaded ones draw nothing.
            self.normalize, self.backbone = self._load(source, size)
        self.eval().requires_grad_(False)
        try:
            self.width = self(torch.zeros(1, 3, size, size)).shape[1]
        except Exception as error:  # Each model raises its own.
            line = first_line(error)
            raise ValueError(f"teacher {source} takes no images of {size} pixels: {line}") from error

    @staticmethod
    def _load(source: str, size: int) -> tuple[nn.Module, nn.Module]:
        if source.startswith(PREFIX):
            net, (_, statistics) = pretrained(source, size)
            assert statistics
            return Normalize(*statistics), net
        from relssl.checkpoint import load_method

        method, _ = load_method(Path(source), "cpu")
        return method.normalize, method.backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(self.normalize(images))
