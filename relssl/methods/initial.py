"""The weights that an encoder starts with, of a file or pretrained by timm."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from relssl.methods import timm_models

if TYPE_CHECKING:
    from relssl.methods.base import Method, TrainConfig

# The first part of the names of a classifier's weights, which an encoder does not have.
CLASSIFIERS = {"fc", "head", "head_dist", "classifier"}


def untrained(config: "TrainConfig", statistics: Callable[[], tuple[Tensor, Tensor]]) -> "Method":
    """Builds a method as training begins with it, on the device: config.init, config.seed.

    statistics: returns mean and standard deviation [3] of the images, where they are not those that the
        encoder was pretrained on. Errors: those of `initial`, and ValueError for weights that do not fit.
    """
    start = initial(config) if config.init else None
    found = (start and start.statistics) or statistics()
    torch.manual_seed(config.seed)
    method = config.build_on_device(*found)
    if start:
        method.load_backbone(start.state, config.init)
    return method


class Initial(NamedTuple):
    """Weights of an encoder, and the mean and standard deviation [3] of its images, in [0, 1], if known."""

    state: dict[str, Tensor]
    statistics: tuple[Tensor, Tensor] | None


def initial(config: "TrainConfig") -> Initial:
    """Returns what config.init refers to. It may draw from the global generator.

    Raises:
        FileNotFoundError, ValueError: there are no such weights.
    """
    if config.init != "pretrained":
        return Initial(_read(Path(config.init)), None)
    if not config.arch.startswith(timm_models.PREFIX):
        raise ValueError(f"pretrained weights are timm's: set --arch to timm/{config.arch} or another model")
    return pretrained(config.arch, config.image_size, config.patch_size)[1]


def pretrained(arch: str, image_size: int, patch_size: int | None = None) -> tuple[nn.Module, Initial]:
    """Returns a model of timm with its pretrained weights, and these with the statistics of its images."""
    arguments = timm_models.create_arguments(arch, image_size, patch_size)
    net = timm_models.create(arch, arguments, pretrained=True)
    about: Any = net.pretrained_cfg
    mean, std = (torch.tensor(about[name]) for name in ("mean", "std"))
    return net, Initial(net.state_dict(), (mean, std))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} with weights to begin with")
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(f"{path} needs another package: pip install safetensors") from error
    except Exception as error:  # torch and safetensors raise almost any exception for a damaged file.
        raise ValueError(f"{path} has no weights that can be read ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in state.items()
    ):
        raise ValueError(f"{path} is no state_dict of an encoder, such as relssl export writes")
    return state


def load(backbone: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads the weights, but for those of a classifier; raises ValueError if they do not fit."""
    own = backbone.state_dict()
    state = {name: t for name, t in state.items() if name in own or name.split(".")[0] not in CLASSIFIERS}
    shared = own.keys() & state.keys()
    found = {
        "lacks": own.keys() - shared,
        "also has": state.keys() - shared,
        "has in other shapes (--stem, --image-size, --patch-size)": {
            name for name in shared if own[name].shape != state[name].shape
        },
    }
    if any(found.values()):
        wrong = [f"{what} {_some(names)}" for what, names in found.items() if names]
        raise ValueError(f"the weights of {source} are of another encoder: it {', '.join(wrong)}")
    if wrong := [name for name, t in state.items() if not t.isfinite().all()]:
        raise ValueError(f"the weights of {source} are not finite: {_some(set(wrong))}")
    backbone.load_state_dict(state)


def _some(names: set[str]) -> str:
    first, *others = sorted(names)
    return first + f" and {len(others)} more" * bool(others)
