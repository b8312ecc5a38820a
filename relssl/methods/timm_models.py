"""Encoders of timm: "timm/NAME" is its model NAME without a classifier, for images of any size."""

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from relssl.datasets.torchvision_import import torchvision  # noqa: F401  timm imports it, too.
from relssl.methods.batch_norm import SplitBatchNorm2d

PREFIX = "timm/"


def build(
    arch: str, stem: str, bn_splits: int, sides: Sequence[int], patch_size: int | None
) -> tuple[nn.Module, int]:
    """Builds an encoder; returns it and its width. Arguments and errors are those of `backbones.build`."""
    arguments = create_arguments(arch, sides[0], patch_size)
    net = create(arch, arguments, bn_splits)
    if is_resnet(arch) and stem != "imagenet":
        if not isinstance(net.conv1, nn.Conv2d):
            raise ValueError(f"{arch} has several convolutions as its stem: --stem imagenet")
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
        if stem == "small":
            net.maxpool = nn.Identity()
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None) or 0
    patch = patch if isinstance(patch, int) else max(patch)
    if patch > sides[0]:
        raise ValueError(f"{arch} has patches of {patch} pixels, images of {sides[0]}: set --patch-size")
    net.eval()
    for side in sides:
        try:
            with torch.no_grad():
                features = net(torch.zeros(1, 3, side, side))
        except Exception as error:  # Each model raises its own.
            raise ValueError(f"{arch} takes no images of {side} pixels: {first_line(error)}") from error
    return net.train(), features.shape[1]


def create(arch: str, arguments: dict[str, Any], bn_splits: int = 1, pretrained: bool = False) -> nn.Module:
    """Creates timm's model. arguments: those of `create_arguments`.

    Raises:
        ValueError: bn_splits > 1 for a model that is no ResNet with BatchNorm, or no pretrained weights.
    """
    import timm

    options = dict(arguments)
    if bn_splits > 1:
        with torch.device("meta"):
            plain = create(arch, arguments)
        if not (is_resnet(arch) and isinstance(plain.bn1, nn.BatchNorm2d)):
            needs = f"BatchNorm in {bn_splits} parts needs a ResNet with BatchNorm"
            raise ValueError(f"{needs}, which {arch} is not: --bn-splits 1")
        options["norm_layer"] = partial(SplitBatchNorm2d, splits=bn_splits)
    try:
        return timm.create_model(arch.removeprefix(PREFIX), num_classes=0, pretrained=pretrained, **options)
    except Exception as error:  # Of a download, almost any.
        if not pretrained:
            raise
        raise ValueError(f"cannot load the pretrained weights of {arch}: {first_line(error)}") from error


def is_resnet(arch: str) -> bool:
    """Whether a model of timm is one of its ResNets, ResNeXts and the like."""
    import timm

    return timm.models.model_entrypoint(arch.removeprefix(PREFIX)).__module__ == "timm.models.resnet"


def create_arguments(arch: str, image_size: int, patch_size: int | None = None) -> dict[str, Any]:
    """Returns the arguments of timm.create_model that adapt a model to the size of the images.

    A vision transformer gets position embeddings for it, which it interpolates for the other sizes of
    multi-crop, whose sides it pads to multiples of the patches.

    Raises:
        ValueError: timm is not installed or has no such model, or the model takes no such size or patches.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{arch} needs another package: pip install timm") from error
    name = arch.removeprefix(PREFIX)
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3)
        raise ValueError(f"timm has no model {name!r}" + f"; similar: {', '.join(similar)}" * bool(similar))
    dynamic: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True, "dynamic_img_pad": True}
    patches: dict[str, Any] = {} if patch_size is None else {"patch_size": patch_size}
    for arguments in (dynamic | patches, {"img_size": image_size, **patches}, patches):
        try:
            with torch.device("meta"):  # where creating a model takes no time
                timm.create_model(name, num_classes=0, **arguments)
            return arguments
        except TypeError as error:  # of an argument that the model does not have
            refused = error
        except Exception as error:  # Of a size or a tag of weights, each model raises its own.
            line = first_line(error)
            raise ValueError(f"timm cannot create {name} for {image_size} pixels: {line}") from error
    raise ValueError(f"{arch} takes no patch size") from refused


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__
