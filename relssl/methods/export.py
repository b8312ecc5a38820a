"""An encoder under the names of torchvision's or timm's own model, and the Python that builds that model."""

from typing import Any, Literal

from torch import Tensor, nn

from relssl.methods.backbones import Arch, Stem

Library = Literal["relssl", "torchvision", "timm"]

# Blocks of timm's stages; torchvision's MobileNetV3 has them all in a row.
STAGES = {"mobilenet_v3_large": (1, 2, 3, 4, 2, 3), "efficientnet_b0": (1, 2, 2, 3, 3, 4, 1)}
# timm's names of what comes after the last block.
LAST = {"mobilenet_v3_large": ("blocks.6.0.conv", "blocks.6.0.bn1"), "efficientnet_b0": ("conv_head", "bn2")}
# Convolutions and norms of a block, by how many there are: the first block has no expansion.
LAYERS = {
    2: (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    3: (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
}


def encoder_state(backbone: nn.Module, arch: Arch, library: Library) -> dict[str, Tensor]:
    """The state_dict of an encoder (`backbones.build`), as the library's model loads it with strict=True.

    Raises:
        ValueError: the library has no model of that architecture.
    """
    state = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    if library != "relssl" and arch == "conv4":
        raise ValueError(f"{library} has no conv4; --for relssl writes it")
    if library != "timm" or arch.startswith("resnet"):  # timm's ResNets have torchvision's names.
        return state
    names = _timm_names(backbone, arch)
    split = [(name.rpartition("."), tensor) for name, tensor in state.items()]
    return {f"{names[module]}.{part}": tensor for (module, _, part), tensor in split}


def _timm_names(backbone: nn.Module, arch: Arch) -> dict[str, str]:
    """timm's names of the convolutions and norms of torchvision's MobileNetV3 or EfficientNet, by theirs."""
    features: Any = backbone.features
    names = {"features.0.0": "conv_stem", "features.0.1": "bn1"}
    names |= {f"features.{len(features) - 1}.{i}": name for i, name in enumerate(LAST[arch])}
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(STAGES[arch]) for i in range(count)]
    blocks = [(name, block) for name, block in backbone.named_modules() if name.endswith(".block")]
    for (block_name, block), place in zip(blocks, places, strict=True):
        children = dict(block.named_children())
        squeezes = [i for i, child in children.items() if hasattr(child, "fc1")]
        layers = iter(LAYERS[len(children) - len(squeezes)])
        for i in children:
            ours = {"fc1": "se.conv_reduce", "fc2": "se.conv_expand"}
            if i not in squeezes:
                ours = dict(zip("01", next(layers), strict=True))
            names |= {f"{block_name}.{i}.{part}": f"{place}.{name}" for part, name in ours.items()}
    return names


def recipe(arch: Arch, stem: Stem, library: Library) -> str:
    """A line of Python that builds, as `net`, the library's model of these features, without a classifier."""
    if library == "relssl":
        return f"net, _ = relssl.methods.backbones.build({arch!r}, {stem!r})"
    resnet = arch.startswith("resnet")
    if library == "torchvision":
        lines = [
            f"net = torchvision.models.{arch}()",
            f"net.{'fc' if resnet else 'classifier'} = nn.Identity()",
        ]
        first = "net.features[0][0]"
    elif arch == "mobilenet_v3_large":  # conv_head is the first layer of torchvision's classifier.
        lines = ['net = timm.create_model("mobilenetv3_large_100", num_classes=0, bn_eps=1e-3)']
        lines += ["net.conv_head = net.act2 = nn.Identity()"]
        first = "net.conv_stem"
    else:
        lines = [f'net = timm.create_model("{arch}", num_classes=0)']
        first = "net.conv_stem"
    if resnet and stem != "imagenet":
        lines += ["net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)"]
        lines += ["net.maxpool = nn.Identity()"] if stem == "small" else []
    elif stem != "imagenet":
        lines += [f"{first}.stride = (1, 1)"]
    return "; ".join(lines)
