"""What the training loop and the methods agree on: a config that builds a module that makes a loss."""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl.data import Data, Images
from relssl.distributed import local_rank
from relssl.methods.backbones import Arch, Stem
from relssl.queue import FeatureQueue

# The least and the greatest value of settings; those that a method lacks are skipped.
RANGES = {
    **dict.fromkeys(("epochs", "batch_size", "image_size", "dim", "hidden", "bn_splits"), (1, inf)),
    **dict.fromkeys(("queue_size", "warmup_epochs", "judge_every", "workers", "clusters"), (0, inf)),
    **dict.fromkeys(("predictor", "info_nce_epochs", "randaugment"), (0, inf)),
    **dict.fromkeys(("lr", "weight_decay", "sigma", "weak_jitter"), (0, inf)),
    **dict.fromkeys(("sgd_momentum", "momentum", "info_nce_weight", "crop_min"), (0, 1)),
}

DataName = Literal["digits", "cifar10", "cifar100", "cifar20", "stl10", "folder", "arrays"]


def at_least_float32(x: Tensor) -> Tensor:
    """For what autocast must not round: norms and softmaxes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class TrainConfig:
    """Settings of the training loop, shared by all methods. In brackets: where a default comes from."""

    data: DataName = "cifar10"
    """digits is bundled with scikit-learn, cifar20 is CIFAR-100 by its 20 superclasses, arrays an .npz of
    your own, folder a tree of images, with or without labels."""
    data_root: Path | None = None
    """Where the data lie: a folder, or the .npz of arrays. Not needed for digits."""
    download: bool = False
    """Let torchvision download cifar10, cifar100 or stl10 into --data-root."""
    classes: str = ""
    """Class folders to use of a folder: imagenet-10, imagenet-dogs, or a text file of names. Default: all."""
    arch: Arch = "resnet18"
    """Encoder. [ReSSL: resnet18 on small data sets, resnet50 on ImageNet; SACC: resnet34]"""
    stem: Stem = "small"
    """First layers. [ReSSL: 3x3 without pooling at 32 px, with it at 64 px; SACC: imagenet, at 224 px]"""
    image_size: int = 32
    """Side of the square images that the encoder sees, in pixels. [data set]"""
    out: Path = Path("out/train")
    """Folder for checkpoint.pt, metrics.json and TensorBoard events."""
    resume: bool = False
    """Go on from out/checkpoint.pt, if it is there: bit for bit where no setting has changed."""
    save_every: str = ""
    """Steps (500) or minutes (10m) between checkpoints, besides those at the ends of epochs. [relssl]"""
    reschedule: bool = False
    """On resuming with another number of epochs, let the rate jump to that number's cosine. [relssl]"""
    epochs: int = 200
    """Passes over the training images. [ReSSL, all data sets]"""
    batch_size: int = 256
    """Images per step of all processes; what is left of an epoch is dropped. [ReSSL: 256, SACC: 200]"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """[ReSSL: sgd, SACC: adam]"""
    lr: float = 0.06
    """Peak learning rate. [ReSSL: 0.06 on small data sets, 0.05 on ImageNet; SACC: 3e-4]"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate: cosine falls to zero. [ReSSL: cosine, SACC: constant]"""
    warmup_epochs: int = 5
    """Epochs in which the rate rises linearly to its peak. [ReSSL: 5, SACC: 0]"""
    sgd_momentum: float = 0.9
    """Momentum of SGD. [ReSSL]"""
    weight_decay: float = 5e-4
    """L2 penalty. [ReSSL: 5e-4 on small data sets, 1e-4 on ImageNet; SACC: 0]"""
    decay_norm_and_bias: bool = True
    """Whether biases and normalisation layers decay too. [ReSSL: not on ImageNet]"""
    queue_size: int = 4096
    """Past embeddings K. [ReSSL: 4096 CIFAR, 16384 STL-10, 131072 ImageNet; SACC: 0]"""
    queue_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the queue; a 16-bit one is the dtype that losses are computed in. [relssl]"""
    backend: str = "auto"
    """Who computes the losses (see relssl info). [relssl]"""
    judge_every: int = 10
    """Epochs between looks at the features' accuracy along the way, and at the end; 0 for none. [relssl]"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype; auto is bf16 on a GPU and fp32 on a CPU. [relssl]"""
    device: str = "auto"
    """auto is the GPU where there is one. [relssl]"""
    workers: int = 2
    """Processes that load a folder's images; data in memory need none. [relssl]"""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and report them, instead of stopping; other images, drawn by the
    number of the unreadable one, take their places in training. [relssl]"""
    seed: int = 0
    """Of weights, batches and augmentations. [relssl]"""

    def check(self) -> None:
        """ValueError if a number is out of its range."""
        for name, (least, greatest) in RANGES.items():
            value = getattr(self, name, least)
            if not least <= value <= greatest:
                wanted = f"at least {least}" if greatest == inf else f"from {least} to {greatest}"
                raise ValueError(f"{name} must be {wanted}, got {value}")

    def pick_device(self) -> torch.device:
        """Of a process of torchrun, the GPU of its local rank. ValueError where there is no such device."""
        if self.device == "auto":
            return torch.device(*("cuda", local_rank()) if torch.cuda.is_available() else ("cpu",))
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:  # The latter from builds without CUDA.
            raise ValueError(f"no device {self.device!r}: {str(error).splitlines()[0]}") from error

    def make(self, mean: Tensor, std: Tensor) -> "Method":
        """`build`, on the device, in channels_last, the layout tensor cores want."""
        method = self.build(mean, std)
        return method.to(device=self.pick_device(), memory_format=torch.channels_last)  # type: ignore

    def build(self, mean: Tensor, std: Tensor) -> "Method":
        """The method, for training images of this mean and standard deviation [3] (of [0, 1], by channel)."""
        raise NotImplementedError

    def fit(self, data: Data) -> "TrainConfig":
        """The config with what depends on the data set filled in."""
        return self

    def passes(self, data: Data) -> dict[str, Images]:
        """What an epoch goes through, in turn: image sets by the name that `Method.forward` is told."""
        return {"train": data.train}

    def skip_list(self) -> list[str] | None:
        """An empty list for `load_batches` to note unreadable files in, or None where they stop the run."""
        return [] if self.skip_unreadable else None

    @property
    def clusters_test_images(self) -> bool:
        """Whether clusters are judged on training and test images, as published, or on the former alone."""
        return True


class Method(nn.Module):
    """A learner of features. Its forward is one training step up to the loss.

    Attributes:
        epoch: how far training has come, in epochs; the loop sets it before every step.
        queue: of past embeddings, where the method keeps one.
        temperatures: of the softmaxes over a queue, by name; the first is the one that targets come from.
    """

    config: TrainConfig
    epoch = 0.0
    queue: FeatureQueue | None
    temperatures: dict[str, float]

    def forward(self, images: Tensor, part: str = "train") -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of uint8 images [B, 3, H, W], and scalars worth logging, by name.

        part: the name of the pass that the images are of (TrainConfig.passes).
        """
        raise NotImplementedError

    @property
    def backbone(self) -> nn.Module:
        """The encoder to keep, of images [B, 3, H, W] to features [B, width]."""
        raise NotImplementedError

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images as the encoder sees them in evaluation: float, of the configured size."""
        size = self.config.image_size
        x = images.to(next(self.parameters()).device).float() / 255
        if x.shape[-2:] == (size, size):
            return x
        return F.interpolate(x, (size, size), mode="bilinear", antialias=True)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features [B, width] of uint8 images [B, 3, H, W], before any projector."""
        return self.backbone(self.prepare(images))

    def embed(self, images: Tensor) -> Tensor:
        """Unit-norm embeddings [B, D] of uint8 images [B, 3, H, W], as a queue would hold them."""
        raise NotImplementedError

    def assign(self, features: Tensor) -> Tensor | None:
        """Soft assignments [B, M] of features [B, width] to clusters, None from a method that makes none."""
        return None
