"""The interface between training loop and methods: a config that builds a module that computes a loss."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relssl import logs
from relssl.augment import View
from relssl.datasets import Crop, Data, Images
from relssl.datasets.images import Views
from relssl.datasets.on_device import DataDevice
from relssl.datasets.sources import check_name
from relssl.distributed import local_rank
from relssl.methods import backbones, initial
from relssl.methods.backbones import Stem
from relssl.queue import FeatureQueue

# Smallest and largest value of settings; those that a method lacks are skipped.
RANGES = {
    **dict.fromkeys(("epochs", "batch_size", "image_size", "dim", "hidden", "bn_splits"), (1, inf)),
    **dict.fromkeys(("accumulate", "patch_size"), (1, inf)),
    **dict.fromkeys(("queue_size", "warmup_epochs", "eval_every", "workers", "clusters"), (0, inf)),
    **dict.fromkeys(("predictor", "info_nce_epochs", "randaugment"), (0, inf)),
    **dict.fromkeys(("lr", "weight_decay", "sigma", "jitter", "clip_grad"), (0, inf)),
    **dict.fromkeys(("sgd_momentum", "momentum", "info_nce_weight", "crop_min"), (0, 1)),
}


def at_least_float32(x: Tensor) -> Tensor:
    """Converts what autocast must not round: the inputs of norms and softmaxes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class TrainConfig:
    """Settings of the training loop, which all methods share. In brackets: where a default comes from."""

    data: str = "cifar10"
    """Data set: digits (bundled with scikit-learn), cifar10, cifar100, cifar20 (CIFAR-100 with its 20
    superclasses), stl10, arrays (an .npz of your own), folder (a tree of images, with or without labels), or
    FILE.py:FUNCTION, a function of yours, make(size) -> relssl.datasets.Data."""
    data_root: Path | None = None
    """Path of the data: a folder, or the .npz of arrays. Not needed for digits."""
    download: bool = False
    """Let torchvision download cifar10, cifar100 or stl10 into --data-root."""
    classes: str = ""
    """Class folders to use of a folder: imagenet-10, imagenet-dogs, or a text file of names. Default: all."""
    arch: str = "resnet18"
    """Encoder: conv4, resnet18, resnet34, resnet50, mobilenet_v3_large, efficientnet_b0, or timm/NAME for a
    model of timm. [ReSSL: resnet18 on small data sets, resnet50 on ImageNet; SACC: resnet34]"""
    stem: Stem = "small"
    """First layers; of timm's models, only ResNets have small ones. [ReSSL: 3x3 without pooling at 32 px,
    with it at 64 px; SACC: imagenet, at 224 px]"""
    patch_size: int | None = None
    """Side of the patches of a vision transformer of timm, in pixels. Default: its own."""
    init: str = ""
    """Weights that the encoder starts with: a file that relssl export wrote, or another with a state_dict of
    the model; or pretrained, for timm's, with the mean and deviation of its images. Default: random."""
    image_size: int = 32
    """Side of the encoder's square input images, in pixels. [data set]"""
    out: Path = Path("out/train")
    """Folder for checkpoints, metrics.json and the logs."""
    log: tuple[logs.LogName, ...] = ("tensorboard",)
    """Where losses and scores go besides metrics.json: TensorBoard's events, Weights & Biases, metrics.csv.
    Several may be given. [relssl]"""
    resume: bool = False
    """Continue from the newest checkpoint in out, if there is one: bit for bit if no setting has changed."""
    save_every: str = ""
    """Steps (500) or minutes (10m) between checkpoints, besides those at the ends of epochs. [relssl]"""
    reschedule: bool = False
    """On resuming with another number of epochs, let the rate jump to the cosine of that number. [relssl]"""
    epochs: int = 200
    """Passes over the training images. [ReSSL, all data sets]"""
    batch_size: int = 256
    """Images per step of all processes; the rest of an epoch is dropped. [ReSSL: 256, SACC: 200]"""
    accumulate: int = 1
    """Parts of a batch that are computed one after another: less memory, and the same gradients, except that
    BatchNorm normalises each part by itself. SACC, CC and SimCLR run the encoder forward twice. [relssl]"""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimizer. [ReSSL: sgd, SACC: adam]"""
    lr: float = 0.06
    """Peak learning rate. [ReSSL: 0.06 on small data sets, 0.05 on ImageNet; SACC: 3e-4]"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Schedule of the learning rate: cosine falls to zero. [ReSSL: cosine, SACC: constant]"""
    warmup_epochs: int = 5
    """Epochs in which the rate rises linearly to its peak. [ReSSL: 5, SACC: 0]"""
    sgd_momentum: float = 0.9
    """Momentum of SGD. [ReSSL]"""
    weight_decay: float = 5e-4
    """L2 penalty; decoupled with adamw. [ReSSL: 5e-4 on small data sets, 1e-4 on ImageNet; SACC: 0]"""
    decay_norm_and_bias: bool = True
    """Whether weight decay applies to biases and normalisation layers, too; never to what a model of timm
    exempts. [ReSSL: not on ImageNet]"""
    clip_grad: float = 0.0
    """Largest norm of the gradients of a step, which are scaled down to it; 0 for no limit. [relssl]"""
    queue_size: int = 4096
    """Size K of the queue of past embeddings. [ReSSL: 4096 CIFAR, 16384 STL-10, 131072 ImageNet; SACC: 0]"""
    queue_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the queue; losses are computed in it if it has 16 bits. [relssl]"""
    shard_queue: bool = False
    """Under torchrun, each process keeps a part of the queue, its own last embeddings, instead of all of it:
    enqueueing gathers nothing, and the losses gather queries and keys. [relssl]"""
    exclude_own: bool = False
    """Exclude an image's own past embeddings from the losses over the queue. A queue larger than the data set
    contains some of nearly every image. [relssl; the published methods use them]"""
    backend: str = "auto"
    """Backend that computes the losses (see relssl info). [relssl]"""
    eval_every: int = 10
    """Evaluate the features every N epochs, and at the end; 0 for never. [relssl]"""
    compile: Literal["no", "default", "reduce-overhead"] = "no"
    """Mode of torch.compile for views, student and teacher, which takes minutes before the first step.
    reduce-overhead uses CUDA graphs on a GPU. [relssl]"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype; auto is bf16 on a GPU and fp32 on a CPU. [relssl]"""
    device: str = "auto"
    """auto is the GPU if there is one; Apple's (mps) only without RandAugment. [relssl]"""
    workers: int | None = None
    """Processes that load images from files; data in memory need none. Default: the number of usable CPUs,
    under torchrun divided by the processes of a machine. [relssl]"""
    data_device: DataDevice = "auto"
    """Where training images in memory lie: device copies them to the training device, and so does auto if
    that is a GPU and they take less than a quarter of its free memory. [relssl]"""
    skip_unreadable: bool = False
    """Skip images that cannot be read, and report them, instead of stopping; in training, other images,
    drawn by the index of the unreadable one, replace them. [relssl]"""
    seed: int = 0
    """Seed of weights, batches and augmentations. [relssl]"""

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.data_root = None if self.data_root is None else Path(self.data_root)

    def validate(self) -> None:
        """Raises ValueError for a number out of its range, an option without effect, or no such encoder."""
        for name, (smallest, largest) in RANGES.items():
            value = getattr(self, name, smallest)
            if value is not None and not smallest <= value <= largest:
                expected = f"at least {smallest}" if largest == inf else f"from {smallest} to {largest}"
                raise ValueError(f"{name} must be {expected}, got {value}")
        check_name(self.data)
        logs.check(self.log)
        for name in ("exclude_own", "shard_queue"):
            if getattr(self, name) and not self.queue_size:
                raise ValueError(f"{name} needs a queue, got queue_size 0")
        if self.init == "pretrained" and getattr(self, "normalize", "all") != "all":
            raise ValueError("pretrained weights are of normalised images: they need --normalize all")
        with torch.device("meta"):  # where building takes no time
            self.build_backbone()

    def as_json(self) -> dict[str, Any]:
        """Returns the settings as JSON has them: paths are strings, tuples are lists."""
        return json.loads(json.dumps(asdict(self), default=str))

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides of the images that the encoder gets, the largest one first."""
        return (self.image_size,)

    def build_backbone(self) -> tuple[nn.Module, int]:
        """Builds the encoder; returns it and the width of its features. Errors: `backbones.build`."""
        bn_splits = getattr(self, "bn_splits", 1)
        return backbones.build(self.arch, self.stem, bn_splits, self.sides, self.patch_size)

    def build_queue(self, dim: int) -> FeatureQueue:
        """Builds the queue of embeddings of width D."""
        dtype = getattr(torch, self.queue_dtype)
        return FeatureQueue(self.queue_size, dim, dtype=dtype, ids=self.exclude_own, sharded=self.shard_queue)

    def pick_device(self) -> torch.device:
        """Returns the device, under torchrun the GPU of the local rank; ValueError if there is none such."""
        if self.device == "auto":
            if torch.cuda.is_available():
                return torch.device("cuda", local_rank())
            # RandAugment computes in float64, which MPS lacks.
            mps = torch.backends.mps.is_available() and not getattr(self, "randaugment", 0)
            return torch.device("mps" if mps else "cpu")
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:  # The latter comes from builds without CUDA.
            raise ValueError(f"no device {self.device!r}: {str(error).splitlines()[0]}") from error

    def build_on_device(self, mean: Tensor, std: Tensor) -> "Method":
        """Calls `build`, and moves the method to the device, in channels_last, the layout of tensor cores."""
        method = self.build(mean, std)
        return method.to(device=self.pick_device(), memory_format=torch.channels_last)  # type: ignore

    def build(self, mean: Tensor, std: Tensor) -> "Method":
        """Builds the method for images in [0, 1] with this mean and standard deviation by channel, [3]."""
        raise NotImplementedError

    def resolve(self, data: Data) -> "TrainConfig":
        """Returns the config with the settings that depend on the data set filled in."""
        return self

    def passes(self, data: Data) -> dict[str, Images]:
        """Returns the image sets of an epoch, in their order, by the names that `Method.forward` gets."""
        return {"train": data.train}

    def skip_list(self) -> list[str] | None:
        """Returns an empty list for the unreadable files of `load_batches`, or None if they stop the run."""
        return [] if self.skip_unreadable else None

    @property
    def clusters_test_images(self) -> bool:
        """Whether clusters are scored on training and test images, as published, or only on the former."""
        return True


def settings_of(config: TrainConfig, other: type[TrainConfig]) -> dict[str, Any]:
    """Returns those settings of a config that another class of configs has, too."""
    names = {field.name for field in fields(other)}
    return {name: value for name, value in vars(config).items() if name in names}


class Method(nn.Module):
    """A method that learns features. Its forward is one training step up to the loss.

    A step consists of `update_teacher`, `augment`, `encode`, `loss` and `update_queue`, in this order, which
    `relssl.gradients` calls for parts of a batch.

    Attributes:
        compares_images: whether the loss compares the images of a batch with each other, in contrast to a
            mean of losses of single images.
        epoch: progress of training in epochs, which the loop sets before every step.
        normalize: maps images in [0, 1] to the backbone's input, in evaluation.
        queue: past embeddings, if the method keeps any.
        temperatures: those of the softmaxes over a queue, by name; the first one is that of the targets.
    """

    config: TrainConfig
    compares_images: bool
    default_pass = "train"
    epoch = 0.0
    normalize: nn.Module
    queue: FeatureQueue | None
    temperatures: dict[str, float]

    def forward(
        self, images: Views, pass_name: str | None = None, ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of uint8 images, and scalars to log, by name.

        Args:
            images: uint8 [B, 3, H, W], or a tuple of such crops, one for each view, in the order of `crops`.
            pass_name: the name of the images' set in TrainConfig.passes; None for `default_pass`.
            ids: int64 [B], one for each image of the run, which the queue keeps beside its embedding; None
                unless config.exclude_own.
        """
        pass_name = pass_name or self.default_pass
        self.update_teacher()
        outputs = self.encode(self.augment(images), pass_name)
        loss, logs = self.loss(outputs, pass_name, ids)
        self.update_queue(outputs, ids)
        return loss, logs

    @property
    def views(self) -> Sequence[nn.Module]:
        """The augmentations of an image in a step, in the order of what `augment` returns."""
        raise NotImplementedError

    @property
    def crops(self) -> tuple[Crop, ...] | None:
        """Random crops of the views, in their order, which the workers take that read images from files.

        None where one of them is not a `View`: `augment` then gets the central square of such images.
        """
        views = [view for view in self.views if isinstance(view, View)]
        return tuple(view.crop for view in views) if len(views) == len(self.views) else None

    def augment(self, images: Views) -> list[Tensor]:
        """Computes the views [B, 3, S, S] of uint8 images [B, 3, H, W], or of a tuple of their `crops`."""
        if isinstance(images, tuple):
            return [view(crop, cropped=True) for view, crop in zip(self.views, images, strict=True)]
        return [view(images) for view in self.views]

    def encode(self, views: Sequence[Tensor], pass_name: str) -> tuple[Tensor, ...]:
        """Computes what the losses compare, tensors with a row for each image [B, ...], of its views."""
        raise NotImplementedError

    def loss(
        self, outputs: Sequence[Tensor], pass_name: str, ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of the outputs of `encode`, and scalars to log, by name; it changes nothing."""
        raise NotImplementedError

    def update_teacher(self) -> None:
        """Moves the teacher, if there is one, before a step."""

    def update_queue(self, outputs: Sequence[Tensor], ids: Tensor | None = None) -> None:
        """Enqueues those of the outputs of a step that its queue keeps, if there is one."""

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The modules that `encode` calls."""
        raise NotImplementedError

    def compile_parts(self, **options: Any) -> None:
        """Compiles views and networks, each as a whole and for each shape; options are torch.compile's."""
        # All modules of torch itself share one count of graphs, which is limited to 8.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for module in dict.fromkeys((*self.views, *self.networks)):
            # In contrast to module.compile(), this accepts modules of torch itself.
            module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False, **options)

    def discard_compiled(self) -> None:
        """Undoes `compile_parts`: a copy of the method would go on with the graphs of its original."""
        for module in self.modules():
            module.__dict__.pop("forward", None)

    def eager(self) -> AbstractContextManager:
        """Returns a context in which nothing is compiled, for batches of other shapes than in training."""
        return nullcontext() if self.config.compile == "no" else torch.compiler.set_stance("force_eager")

    @property
    def backbone(self) -> nn.Module:
        """The encoder to keep, which maps images [B, 3, H, W] to features [B, width]."""
        raise NotImplementedError

    def load_backbone(self, state: dict[str, Tensor], source: str) -> None:
        """Loads an encoder's weights before training; raises ValueError if they do not fit."""
        initial.load(self.backbone, state, source)

    def prepare(self, images: Tensor) -> Tensor:
        """Converts uint8 images to the encoder's input in evaluation: float, of the configured size."""
        size = self.config.image_size
        x = images.to(next(self.parameters()).device).float() / 255
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        return self.normalize(x)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Computes features [B, width] of uint8 images [B, 3, H, W], before any projector."""
        return self.backbone(self.prepare(images))

    def embed(self, images: Tensor) -> Tensor:
        """Computes unit-norm embeddings [B, D] of uint8 images [B, 3, H, W], as a queue would hold them."""
        raise NotImplementedError

    def assign(self, features: Tensor) -> Tensor | None:
        """Computes soft assignments [B, M] of features [B, width] to clusters; None without clusters."""
        return None
