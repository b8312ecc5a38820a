"""Data sets by name, as uint8 images [N, 3, H, W] that are indexed a batch at a time.

Augmentation is not done here but by the methods, on the batch and on its device.
"""

import pickle
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Images(Protocol):
    """A set of images: images[indices] -> uint8 [B, 3, H, W], labels int64 [B]; -1 stands for no label."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...


class Arrays(Images):
    """Images in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


class Unreadable(ValueError):
    """Unreadable(path, reason): an image file that cannot be read; both are strings, which pickle."""

    def __str__(self) -> str:
        return "cannot read {}: {}".format(*self.args)


class Files(Images):
    """Images read from files one by one; one that cannot be read raises Unreadable.

    Args:
        samples: paths and labels.
        read: a path to uint8 [3, H, W], of one shape.
    """

    def __init__(self, samples: list[tuple[str, int]], read: Callable[[str], Tensor]) -> None:
        self.samples, self.read = samples, read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = []
        for path, _ in (self.samples[i] for i in indices):
            try:
                images.append(self.read(path))
            except Exception as error:  # PIL raises nearly anything over a damaged file.
                raise Unreadable(path, str(error) or type(error).__name__) from error
        return torch.stack(images), torch.tensor([self.samples[i][1] for i in indices])


class Subset(Images):
    """Some images of a set, by their indices."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.images[[self.indices[i] for i in indices]]


class Numbered(Subset):
    """Some images of a set, whose "labels" [B, 2] are their labels and their indices in the set."""

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, labels = super().__getitem__(indices)
        return images, torch.stack((labels, torch.tensor([self.indices[i] for i in indices])), 1)


class Joined(Images):
    """Several sets of images of one shape, one behind the other."""

    def __init__(self, *parts: Images) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(indices)
        order, found = [], []
        for part in self.parts:
            mine = torch.nonzero((at >= 0) & (at < len(part))).flatten()
            if len(mine):
                order.append(mine)
                found.append(part[at[mine].tolist()])
            at = at - len(part)
        back = torch.cat(order).argsort()
        images, labels = (torch.cat(t)[back] for t in zip(*found, strict=True))
        return images, labels


def reads_files(images: Images) -> bool:
    """Whether loading a batch is work, for processes of its own."""
    if isinstance(images, Subset):
        return reads_files(images.images)
    return isinstance(images, Files) or (isinstance(images, Joined) and any(map(reads_files, images.parts)))


@dataclass
class Data:
    """What a method trains on, and the labelled sets that its features are judged by.

    Attributes:
        train: all images that are not the test's.
        labelled: those of them with labels, as they are looked at in evaluation; None where there are none.
        test: labelled, too; None where there are no labelled test images.
        classes: names of the labels; empty where there are none.
        unlabelled: those of `train` without labels, where there are some, as evaluation looks at them.
    """

    train: Images
    labelled: Images | None
    test: Images | None
    classes: list[str]
    unlabelled: Images | None = None

    @property
    def seen(self) -> Images:
        """Training images as evaluation looks at them: the labelled ones, or all if there are no labels."""
        some = self.unlabelled if self.labelled is None else self.labelled
        return self.train if some is None else some


def load(name: str, root: Path | None, size: int, download: bool = False, classes: str = "") -> Data:
    """A data set by name. Images in memory keep their size where it is below `size`; those of files get it.

    classes: of a folder, those to use (see `class_names`).

    Raises:
        ValueError: an unknown name, a missing root, or data of the wrong form.
        FileNotFoundError: the data are not where root says.
    """
    if name == "digits":
        return _digits(size)
    if root is None:
        raise ValueError(f"data {name!r} needs a data root (--data-root)")
    if name == "arrays":
        return _arrays(Path(root), size)
    if name == "folder":
        return _folder(Path(root), size, class_names(classes))
    if name in ("cifar10", "cifar100", "cifar20", "stl10"):
        return _torchvision(name, Path(root), size, download)
    known = "digits, cifar10, cifar100, cifar20, stl10, folder or arrays"
    raise ValueError(f"data must be {known}; got {name!r}")


def at_most(images: np.ndarray, labels: np.ndarray, size: int) -> Arrays:
    """uint8 images [N, H, W, 3] and labels [N], square, and resized where they are larger than `size`."""
    return in_memory(images, labels, min(size, *images.shape[1:3]))


def in_memory(images: np.ndarray, labels: np.ndarray, size: int) -> Arrays:
    """uint8 images [N, H, W, 3] and labels [N], resized to size x size where they differ."""
    tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    if tensor.shape[-2:] != (size, size):
        parts = [F.interpolate(t, (size, size), mode="bilinear", antialias=True) for t in tensor.split(1024)]
        tensor = torch.cat(parts)
    return Arrays(tensor, torch.from_numpy(labels.astype(np.int64)))


def _digits(size: int) -> Data:
    """1,797 scans of handwritten digits, 8 x 8, bundled with scikit-learn; a fifth is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=3)
    parts = train_test_split(images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    train, test = in_memory(parts[0], parts[2], size), in_memory(parts[1], parts[3], size)
    return Data(train, train, test, [str(d) for d in range(10)])


def _arrays(path: Path, size: int) -> Data:
    """An .npz with train_x and, if given, train_y, test_x with test_y, and classes.

    Images are uint8 [N, H, W, 3], labels integers [N].
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read {path} as an .npz: {error}") from error
    # Labels are of images, and test images are of use with labels alone.
    needed = {"train_x"} | ({"test_x", "test_y"} if arrays.keys() & {"test_x", "test_y"} else set())
    missing = needed - arrays.keys()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it has {', '.join(arrays)}")
    images = {part: arrays[f"{part}_x"] for part in ("train", "test") if f"{part}_x" in arrays}
    labels = {part: arrays[f"{part}_y"] for part in images if f"{part}_y" in arrays}
    for part, x in images.items():
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
            got = f"{x.dtype} {x.shape}{_advice(x)}"
            raise ValueError(f"{path}: {part}_x must be uint8 [N, H, W, 3], got {got}")
    for part, y in labels.items():
        count = len(images[part])
        if y.shape != (count,) or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"{path}: {part}_y must be integers [{count}], got {y.dtype} {y.shape}")
    known = max((int(y.max()) + 1 for y in labels.values()), default=0)
    names = [str(c) for c in arrays.get("classes", range(known))]
    for part, y in labels.items():
        if y.min() < 0 or y.max() >= len(names):
            found = f"{y.min()} to {y.max()}"
            raise ValueError(f"{path}: {part}_y must be from 0 to {len(names) - 1}, got {found}")
    size = min(size, *(side for x in images.values() for side in x.shape[1:3]))
    sets = {part: in_memory(x, labels.get(part, np.full(len(x), -1)), size) for part, x in images.items()}
    train, test = sets["train"], sets.get("test")
    labelled, unlabelled = (train, None) if "train" in labels else (None, train)
    return Data(train, labelled, test, names if labels else [], unlabelled)


def _advice(x: np.ndarray) -> str:
    """How images of another form become those that are expected, where that is known."""
    if x.ndim == 4 and x.shape[1] == 3 != x.shape[3]:
        return ": channels are first; x.transpose(0, 2, 3, 1) puts them last"
    if x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 1):
        return ": one channel; np.repeat(x.reshape(*x.shape[:3], 1), 3, axis=3) makes three of it"
    if x.dtype == np.uint16:
        return ": 16 bits; (x / 257).round().astype(np.uint8) scales them to 8"
    return ""


def _torchvision(name: str, root: Path, size: int, download: bool) -> Data:
    from relssl.data.torchvision_import import torchvision

    def part(source: Any, **which: Any) -> Any:
        try:
            return source(str(root), download=download, **which)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"no {name} under {root} (relssl train --download fetches it): {error}"
            ) from error

    if name == "stl10":
        sets = [part(torchvision.datasets.STL10, split=s) for s in ("train", "unlabeled", "test")]
        labelled, unlabelled, test = (at_most(s.data.transpose(0, 2, 3, 1), s.labels, size) for s in sets)
        return Data(Joined(labelled, unlabelled), labelled, test, sets[0].classes, unlabelled)
    source = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    sets = [part(source, train=t) for t in (True, False)]
    classes = sets[0].classes
    labels = [s.targets for s in sets]
    if name == "cifar20":  # torchvision, which has checked the files, reads the 100 classes only.
        folder = root / source.base_folder
        files = [
            pickle.loads((folder / f).read_bytes(), encoding="latin1") for f in ("train", "test", "meta")
        ]
        labels, classes = [f["coarse_labels"] for f in files[:2]], files[2]["coarse_label_names"]
    train, test = (at_most(s.data, np.array(y), size) for s, y in zip(sets, labels, strict=True))
    return Data(train, train, test, classes)


# Folders of ImageNet that the literature on clustering calls by these names.
CLASSES = {
    "imagenet-10": """
        n02056570 n02085936 n02128757 n02690373 n02692877 n03095699 n04254680 n04285008 n04467665 n07747607
    """,
    "imagenet-dogs": """
        n02085936 n02086646 n02088238 n02091467 n02097130 n02099601 n02101388 n02101556 n02102177 n02105056
        n02105412 n02105855 n02107142 n02110958 n02112137
    """,
}


def class_names(classes: str) -> list[str] | None:
    """Class folders by a name of CLASSES or from a text file, one to a line; None, for all, from ""."""
    if not classes:
        return None
    if classes in CLASSES:
        return CLASSES[classes].split()
    if not Path(classes).is_file():
        raise FileNotFoundError(
            f"classes must be {', '.join(CLASSES)} or a text file of names; no file {classes}"
        )
    return [line.strip() for line in Path(classes).read_text().splitlines() if line.strip()]


def _folder(root: Path, size: int, classes: list[str] | None) -> Data:
    """root/train and root/val (or test), a folder per class, or images without labels.

    A train folder without class folders has no labels, nor has a root without a train folder: there all
    images at any depth are trained on. A val (or test) folder without class folders is no test set.

    Images must share a shape to be augmented as a batch, so each is first cut to its central square of
    8/7 of `size`, as in ImageNet evaluation; the random crops of training are taken out of that.
    """
    from relssl.data.torchvision_import import torchvision  # noqa: F401  isort: skip
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
    from torchvision.transforms import v2  # which the first import makes possible

    from relssl.data.decode import read_rgb

    train = root / "train"
    tests = [root / n for n in ("val", "test") if classes or _class_folders(root / n)]
    test = next((folder for folder in tests if folder.is_dir()), None)
    if not root.is_dir() or ((classes or test) and not train.is_dir()):
        raise FileNotFoundError(f"no folder {train if root.is_dir() else root}")
    labelled = bool(classes or _class_folders(train))
    sets = [folder for folder in (train if labelled else None, test) if folder]
    names = classes or sorted(set().union(*map(_class_folders, sets)))
    for folder in sets:
        lacking = [n for n in names if not (folder / n).is_dir()]
        if lacking:
            more = f" and {len(lacking) - 1} others" if len(lacking) > 1 else ""
            raise FileNotFoundError(f"no class folder {folder / lacking[0]}{more}")

    labels = {name: label for label, name in enumerate(names)}
    side = round(size * 8 / 7)

    def files(folder: Path, labels: dict[str, int], crop: int) -> Files:
        try:
            samples = make_dataset(str(folder), labels, IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no images in {root}: {error}") from error
        return Files(samples, v2.Compose([read_rgb, v2.Resize(side), v2.CenterCrop(crop), v2.PILToTensor()]))

    test_files = files(test, labels, size) if test else None
    if labelled:
        return Data(files(train, labels, side), files(train, labels, size), test_files, names)
    everything = train if train.is_dir() else root
    where = everything.parent, {everything.name: -1}
    return Data(files(*where, side), None, test_files, names, files(*where, size))


def _class_folders(folder: Path) -> set[str]:
    return {f.name for f in folder.iterdir() if f.is_dir()} if folder.is_dir() else set()
