"""What the training loop and the methods agree on: a config that builds a module that makes a loss."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

DataName = Literal["digits", "cifar10", "cifar100", "stl10", "folder", "arrays"]


@dataclass
class TrainConfig:
    """Settings of the training loop, shared by all methods. In brackets: where a default comes from."""

    data: DataName = "cifar10"
    """digits is bundled with scikit-learn, arrays an .npz of your own, folder a tree of images."""
    data_root: Path | None = None
    """Where the data lie: a folder, or the .npz of arrays. Not needed for digits."""
    download: bool = False
    """Let torchvision download cifar10, cifar100 or stl10 into --data-root."""
    image_size: int = 32
    """Side of the square images that the encoder sees, in pixels. [data set]"""
    out: Path = Path("out/train")
    """Folder for checkpoint.pt, metrics.json and TensorBoard events."""
    resume: bool = False
    """Go on from out/checkpoint.pt, bit for bit, if it is there."""
    epochs: int = 200
    """Passes over the training images. [ReSSL, all data sets]"""
    warmup_epochs: int = 5
    """Epochs of linear warm-up before the cosine decay to zero. [ReSSL, all data sets]"""
    batch_size: int = 256
    """Images per step; what is left of an epoch is dropped. [ReSSL, all data sets]"""
    lr: float = 0.06
    """Peak learning rate of SGD. [ReSSL: 0.06 on small data sets, 0.05 on ImageNet]"""
    sgd_momentum: float = 0.9
    """Momentum of SGD. [ReSSL]"""
    weight_decay: float = 5e-4
    """L2 penalty. [ReSSL: 5e-4 on small data sets, 1e-4 on ImageNet]"""
    decay_norm_and_bias: bool = True
    """Whether biases and normalisation layers decay too. [ReSSL: not on ImageNet]"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype; auto is bf16 on a GPU and fp32 on a CPU. [relssl]"""
    device: str = "auto"
    """auto is the GPU where there is one. [relssl]"""
    workers: int = 2
    """Processes that load a folder's images; data in memory need none. [relssl]"""
    seed: int = 0
    """Of weights, batches and augmentations. [relssl]"""

    def pick_device(self) -> str:
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    def make(self, mean: Tensor, std: Tensor) -> "Method":
        """`build`, on the device, in channels_last, the layout tensor cores want."""
        method = self.build(mean, std)
        return method.to(device=self.pick_device(), memory_format=torch.channels_last)  # type: ignore

    def build(self, mean: Tensor, std: Tensor) -> "Method":
        """The method, for training images of this mean and standard deviation [3] (of [0, 1], by channel)."""
        raise NotImplementedError


class Method(nn.Module):
    """A learner of features. Its forward is one training step up to the loss."""

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of uint8 images [B, 3, H, W], and scalars worth logging, by name."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Features [B, width] of uint8 images [B, 3, H, W], for evaluation."""
        raise NotImplementedError
