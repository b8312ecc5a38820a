"""Exports an encoder to torchvision's or timm's model: tensors by its names, and code that builds it."""

from typing import Literal

from torch import Tensor, nn

from relssl.methods.backbones import Stem
from relssl.methods.timm_models import PREFIX, create_arguments, is_resnet

Library = Literal["relssl", "torchvision", "timm"]

# Number of blocks in each of timm's stages; torchvision's models have no stages.
STAGES = {"mobilenet_v3_large": (1, 2, 3, 4, 2, 3), "efficientnet_b0": (1, 2, 2, 3, 3, 4, 1)}
# timm's names of the convolution and norm after the last block.
LAST = {"mobilenet_v3_large": ("blocks.6.0.conv", "blocks.6.0.bn1"), "efficientnet_b0": ("conv_head", "bn2")}
# timm's names of a block's convolutions and norms, by their number: the first block has no expansion.
LAYERS = {
    2: (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    3: (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
}


def encoder_state(backbone: nn.Module, arch: str, library: Library) -> dict[str, Tensor]:
    """Returns an encoder's state_dict as the library's model loads it with strict=True.

    Raises:
        ValueError: the library has no model of that architecture.
    """
    state = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    if library != "relssl" and arch == "conv4":
        raise ValueError(f"{library} has no conv4; --for relssl writes it")
    if library == "torchvision" and arch.startswith(PREFIX):
        raise ValueError(f"{arch} is a model of timm: --for timm writes it")
    if library != "timm" or arch.startswith((PREFIX, "resnet")):  # timm's ResNets have torchvision's names.
        return state
    names = _timm_names(backbone, arch)
    split = [(name.rpartition("."), tensor) for name, tensor in state.items()]
    return {f"{names[module]}.{part}": tensor for (module, _, part), tensor in split}


def _timm_names(backbone: nn.Module, arch: str) -> dict[str, str]:
    """Maps the names of torchvision's MobileNetV3 or EfficientNet to timm's, for convolutions and norms."""
    last = len(list(backbone.get_submodule("features").children())) - 1
    names = {"features.0.0": "conv_stem", "features.0.1": "bn1"}
    names |= {f"features.{last}.{i}": name for i, name in enumerate(LAST[arch])}
    timm_blocks = [f"blocks.{stage}.{i}" for stage, count in enumerate(STAGES[arch]) for i in range(count)]
    blocks = [(name, block) for name, block in backbone.named_modules() if name.endswith(".block")]
    for (block_name, block), timm_block in zip(blocks, timm_blocks, strict=True):
        children = dict(block.named_children())
        squeezes = [i for i, child in children.items() if hasattr(child, "fc1")]
        layers = iter(LAYERS[len(children) - len(squeezes)])
        for i in children:
            parts = {"fc1": "se.conv_reduce", "fc2": "se.conv_expand"}
            if i not in squeezes:
                parts = dict(zip("01", next(layers), strict=True))
            names |= {f"{block_name}.{i}.{part}": f"{timm_block}.{name}" for part, name in parts.items()}
    return names


def model_code(
    arch: str, stem: Stem, library: Library, image_size: int = 224, patch_size: int | None = None
) -> str:
    """Returns a line of Python that builds `net`, the library's model of the encoder without a classifier."""
    if library == "relssl":
        sizes = f", sides=({image_size},), patch_size={patch_size}" if arch.startswith(PREFIX) else ""
        return f"net, _ = relssl.methods.backbones.build({arch!r}, {stem!r}{sizes})"
    resnet = arch.startswith("resnet")
    if arch.startswith(PREFIX):
        resnet = is_resnet(arch)
        given = create_arguments(arch, image_size, patch_size)
        options = "".join(f", {name}={value}" for name, value in given.items())
        lines = [f'net = timm.create_model("{arch.removeprefix(PREFIX)}", num_classes=0{options})']
        stem = stem if resnet else "imagenet"  # the model's own
        first = ""
    elif library == "torchvision":
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
