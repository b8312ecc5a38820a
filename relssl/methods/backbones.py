"""Encoders up to the pooled features: torchvision's with stems for small images, timm's, and Conv-4."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import nn

from relssl.datasets.torchvision_import import torchvision
from relssl.methods import timm_models
from relssl.methods.batch_norm import SplitBatchNorm2d

ARCHS = "conv4", "resnet18", "resnet34", "resnet50", "mobilenet_v3_large", "efficientnet_b0"
Stem = Literal["imagenet", "small", "small-pool"]


def conv4(norm: Callable[[int], nn.Module], width: int = 32) -> tuple[nn.Module, int]:
    """Builds Conv-4: 3x3 convolutions, each with norm, ReLU and 2x2 pooling, and a global mean."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (width, 2 * width, 4 * width, 4 * width):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(inplace=True),
        ]
        layers += [nn.MaxPool2d(2, ceil_mode=True)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), inputs


def check(arch: str) -> None:
    """Raises ValueError unless the name is one of ARCHS or begins with timm/."""
    if arch not in ARCHS and not arch.startswith(timm_models.PREFIX):
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, or timm/NAME; got {arch!r}")


def build(
    arch: str,
    stem: Stem = "imagenet",
    bn_splits: int = 1,
    sides: Sequence[int] = (224,),
    patch_size: int | None = None,
) -> tuple[nn.Module, int]:
    """Builds an encoder of images [B, 3, H, W] to features [B, width]; returns it and the width.

    The stem "small" of a ResNet is a 3x3 convolution of stride 1 without max-pooling (CIFAR); "small-pool"
    keeps the pooling (STL-10, Tiny-ImageNet); "imagenet" is torchvision's own. MobileNetV3 and EfficientNet
    have no pooling in the stem: both small stems are their first convolution with stride 1. Of timm's models,
    only ResNets have small stems; the others keep their own.

    Args:
        arch: one of ARCHS, or "timm/NAME".
        bn_splits: parts of a batch with separate BatchNorm statistics.
        sides: the sides H = W of the images, the largest one first, which timm's models may depend on.
        patch_size: the side of the patches of a vision transformer of timm; None for its own.

    Raises:
        ValueError: there is no such model, or it does not take these images, patches or bn_splits.
    """
    check(arch)
    if arch.startswith(timm_models.PREFIX):
        return timm_models.build(arch, stem, bn_splits, sides, patch_size)
    if patch_size is not None:
        raise ValueError(f"patch_size is for vision transformers of timm, not for {arch}")
    options = {"norm_layer": partial(SplitBatchNorm2d, splits=bn_splits)} if bn_splits > 1 else {}
    if options and arch == "mobilenet_v3_large":  # torchvision's settings of its norms.
        options["norm_layer"] = partial(options["norm_layer"], eps=1e-3, momentum=0.01)
    if arch == "conv4":
        return conv4(options.get("norm_layer", nn.BatchNorm2d))
    net = getattr(torchvision.models, arch)(weights=None, **options)
    if arch.startswith("resnet"):
        width = net.fc.in_features
        net.fc = nn.Identity()
        if stem != "imagenet":
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        if stem == "small":
            net.maxpool = nn.Identity()
    else:
        width = net.features[-1].out_channels
        net.classifier = nn.Identity()
        if stem != "imagenet":
            net.features[0][0].stride = (1, 1)
    return net, width
