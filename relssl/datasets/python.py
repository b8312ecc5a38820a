"""Data sets from Python: of a function that a name refers to, or given as `Data`."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relssl.datasets.crops import Crop
from relssl.datasets.data import Data
from relssl.datasets.images import Images, Unreadable, Views

GIVEN = "given"  # The name of data that were passed to train(config, data=...).


def absolute(name: str) -> str:
    """Returns FILE.py:FUNCTION with the absolute path of the file; other names as they are."""
    file, colon, function = name.rpartition(":")
    return f"{Path(file).absolute()}:{function}" if colon and file.endswith(".py") else name


def is_python(name: str) -> bool:
    """Whether a name of data refers to a function, or to data that were passed."""
    return ":" in name or name == GIVEN


def load_python(name: str, size: int) -> Data:
    """Calls a function, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, with the size of the images.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such module or function, or it does not return `Data` of the expected form.
    """
    file, _, function = name.rpartition(":")
    make = getattr(_module(file), function, None)
    if not callable(make):
        raise ValueError(f"{file} has no function {function!r}, which returns the data: make(size) -> Data")
    return checked(make(size), f"data of {name}")


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        _search(Path.cwd())  # As python -m does.
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"no module {error.name!r} for --data {name}:...") from error
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    # By its own name, so that worker processes that do not fork can import it, too.
    _search(path.parent.absolute())
    known = sys.modules.get(path.stem)
    if known is not None:
        if Path(getattr(known, "__file__", None) or "").absolute() != path.absolute():
            raise ValueError(f"a module {path.stem!r} is imported already: rename {path}")
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def checked(data: Any, source: str) -> Data:
    """Returns the data, with sets that have what `Images` has; reads an image of each.

    Raises:
        ValueError: it is no `Data`, or an image or label is not of the form that `Images` describes.
    """
    if not isinstance(data, Data):
        raise ValueError(f"{source} must be a relssl.datasets.Data, got {type(data).__name__}")
    if not isinstance(data.classes, (list, tuple)):
        raise ValueError(f"{source}: classes must be a list of names, got {data.classes!r}")
    sets = {f.name: getattr(data, f.name) for f in fields(data) if f.name != "classes"}
    adapted: dict[int, Images] = {}  # A set that is given twice remains one.
    for name, images in sets.items():
        if images is not None:
            if id(images) not in adapted:
                adapted[id(images)] = images if isinstance(images, Images) else _Adapted(images)
                _check(adapted[id(images)], f"{source}: {name}", len(data.classes))
            if name in ("labelled", "test") and not data.classes:
                raise ValueError(f"{source}: classes must name the labels of {name}, got none")
            sets[name] = adapted[id(images)]
    return replace(data, **sets)


def _check(images: Images, name: str, classes: int) -> None:
    if not len(images):
        raise ValueError(f"{name} has no images")
    try:
        found = images[[0]]
    except Unreadable:  # An error, or skipped, where it is used.
        return
    expected = f"{name}[[0]] must be images uint8 [1, 3, H, W] and labels int64 [1]"
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(t, Tensor) for t in found):
        raise ValueError(f"{expected}, both tensors, got {type(found).__name__}")
    x, y = found
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[:2] != (1, 3):
        raise ValueError(f"{expected}, got images {x.dtype} {list(x.shape)}")
    if y.dtype != torch.int64 or y.shape != (1,):
        raise ValueError(f"{expected}, got labels {y.dtype} {list(y.shape)}")
    if classes and not -1 <= int(y) < classes:
        raise ValueError(f"{name}: labels must be from 0 to {classes - 1}, or -1 for none, got {int(y)}")


class _Adapted(Images):
    """A set of the caller's own class, which has a length and is indexed a batch at a time."""

    def __init__(self, images: Any) -> None:
        self.images = images
        self.needs_workers = getattr(images, "needs_workers", False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices]

    def crop(
        self, indices: Sequence[int], crops: Sequence[Crop], keys: Sequence[str]
    ) -> tuple[Views, Tensor]:
        return (getattr(self.images, "crop", None) or super().crop)(indices, crops, keys)
