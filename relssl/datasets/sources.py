"""`load`: data sets by name, and the data sets of scikit-learn and torchvision."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from relssl.datasets.arrays import load_arrays, resized, resized_down
from relssl.datasets.data import Data
from relssl.datasets.folder import class_names, load_folder
from relssl.datasets.images import ConcatImages
from relssl.datasets.python import GIVEN, load_python

NAMES = "digits", "cifar10", "cifar100", "cifar20", "stl10", "folder", "arrays"


def load(name: str, root: Path | None, size: int, download: bool = False, classes: str = "") -> Data:
    """Loads a data set by name.

    Images in memory keep their size where it is below `size`; images of files are resized to it.

    Args:
        name: one of NAMES, or FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION (see `load_python`).
        classes: which class folders to use of a folder (see `class_names`).

    Raises:
        ValueError: an unknown name, a missing root, or data of a wrong form.
        FileNotFoundError: there are no data at root.
    """
    check_name(name)
    if name == "digits":
        return _digits(size)
    if ":" in name:
        return load_python(name, size)
    if name == GIVEN:
        raise ValueError("the data were passed to train(data=...): pass them, or --data FILE.py:FUNCTION")
    if root is None:
        raise ValueError(f"data {name!r} needs a data root (--data-root)")
    if name == "arrays":
        return load_arrays(Path(root), size)
    if name == "folder":
        return load_folder(Path(root), size, class_names(classes))
    return _torchvision(name, Path(root), size, download)


def check_name(name: str) -> None:
    """Raises ValueError unless `load` takes the name, or may: functions are looked up later."""
    if name.endswith(".py"):
        raise ValueError(f"data {name!r} needs the name of a function: {name}:make, make(size) -> Data")
    if ":" not in name and name not in (*NAMES, GIVEN):
        raise ValueError(f"data must be {', '.join(NAMES)} or FILE.py:FUNCTION; got {name!r}")


def _digits(size: int) -> Data:
    """1,797 scans of handwritten digits, 8 x 8, bundled with scikit-learn; a fifth is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=3)
    parts = train_test_split(images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    train, test = resized(parts[0], parts[2], size), resized(parts[1], parts[3], size)
    return Data(train, train, test, [str(d) for d in range(10)])


def _torchvision(name: str, root: Path, size: int, download: bool) -> Data:
    from relssl.datasets.torchvision_import import torchvision

    def part(source: Any, **which: Any) -> Any:
        try:
            return source(str(root), download=download, **which)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"no {name} under {root} (relssl train --download fetches it): {error}"
            ) from error

    if name == "stl10":
        sets = [part(torchvision.datasets.STL10, split=s) for s in ("train", "unlabeled", "test")]
        labelled, unlabelled, test = (
            resized_down(s.data.transpose(0, 2, 3, 1), s.labels, size) for s in sets
        )
        return Data(ConcatImages(labelled, unlabelled), labelled, test, sets[0].classes, unlabelled)
    source = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    sets = [part(source, train=t) for t in (True, False)]
    classes = sets[0].classes
    labels = [s.targets for s in sets]
    if name == "cifar20":  # torchvision has verified the files, but reads only the 100 classes.
        folder = root / source.base_folder
        files = [
            pickle.loads((folder / f).read_bytes(), encoding="latin1") for f in ("train", "test", "meta")
        ]
        labels, classes = [f["coarse_labels"] for f in files[:2]], files[2]["coarse_label_names"]
    train, test = (resized_down(s.data, np.array(y), size) for s, y in zip(sets, labels, strict=True))
    return Data(train, train, test, classes)
