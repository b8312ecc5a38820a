"""Data sets by name, as uint8 images [N, 3, H, W] that are indexed a batch at a time.

Augmentation is not done here but by the methods, on the batch and on its device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Images(Protocol):
    """A set of labelled images: images[indices] -> uint8 [B, 3, H, W], int64 [B]."""

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


class Files(Images):
    """Images read from files one by one."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(self.samples[i] for i in indices), strict=True)
        return torch.stack(images), torch.tensor(labels)


@dataclass
class Data:
    """What a method trains on, and the labelled sets that its features are judged by."""

    train: Images
    labelled: Images
    test: Images
    classes: list[str]


def load(name: str, root: Path | None, size: int, download: bool = False) -> Data:
    """A data set by name, its images `size` x `size`.

    Raises:
        ValueError: an unknown name, a missing root, or arrays of the wrong form.
        FileNotFoundError: the data are not where root says.
    """
    if name == "digits":
        return _digits(size)
    if root is None:
        raise ValueError(f"data {name!r} needs a data root (--data-root)")
    if name == "arrays":
        return _arrays(Path(root), size)
    if name == "folder":
        return _folder(Path(root), size)
    if name in ("cifar10", "cifar100", "stl10"):
        return _torchvision(name, Path(root), size, download)
    raise ValueError(f"data must be digits, cifar10, cifar100, stl10, folder or arrays; got {name!r}")


def channel_statistics(data: Images) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] by channel, in [0, 1], of at most 10,000 images spread over the set."""
    some = range(0, len(data), max(1, len(data) // 10_000))
    total = torch.zeros(2, 3, dtype=torch.float64)
    pixels = 0
    for start in range(0, len(some), 512):
        x = data[list(some[start : start + 512])][0].double() / 255
        total += torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
        pixels += x.numel() // 3
    mean, square = total / pixels
    return mean.float(), (square - mean**2).clamp_min(1e-6).sqrt().float()


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
    """An .npz with train_x, train_y, test_x, test_y (images uint8 [N, H, W, 3]) and, if given, classes."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with np.load(path, allow_pickle=False) as file:
        missing = {"train_x", "train_y", "test_x", "test_y"} - set(file.files)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it has {', '.join(file.files)}")
        sets = []
        for part in ("train", "test"):
            x, y = file[f"{part}_x"], file[f"{part}_y"]
            if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3:
                raise ValueError(f"{part}_x must be uint8 [N, H, W, 3], got {x.dtype} {x.shape}")
            if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
                raise ValueError(f"{part}_y must be integers [{len(x)}], got {y.dtype} {y.shape}")
            sets.append(in_memory(x, y, size))
        names = [str(c) for c in file["classes"]] if "classes" in file.files else None
    count = int(max(s.labels.max() for s in sets)) + 1
    return Data(sets[0], sets[0], sets[1], names or [str(c) for c in range(count)])


def _torchvision(name: str, root: Path, size: int, download: bool) -> Data:
    from relssl.data.torchvision_import import torchvision

    def part(**which: Any) -> Any:
        try:
            return source(str(root), download=download, **which)
        except RuntimeError as error:
            raise FileNotFoundError(f"no {name} under {root} (--download fetches it): {error}") from error

    if name == "stl10":
        source = torchvision.datasets.STL10
        sets = [part(split=s) for s in ("train+unlabeled", "train", "test")]
        train, labelled, test = (in_memory(s.data.transpose(0, 2, 3, 1), s.labels, size) for s in sets)
        return Data(train, labelled, test, sets[1].classes)
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    sets = [part(train=t) for t in (True, False)]
    train, test = (in_memory(s.data, np.array(s.targets), size) for s in sets)
    return Data(train, train, test, sets[0].classes)


def _folder(root: Path, size: int) -> Data:
    """root/train and root/val (or test), a folder per class.

    Images must share a shape to be augmented as a batch, so each is first cut to its central square of
    8/7 of `size`, as in ImageNet evaluation; the random crops of training are taken out of that.
    """
    from relssl.data.torchvision_import import torchvision  # isort: skip
    from torchvision.transforms import v2  # which the import above makes possible

    test = next((root / n for n in ("val", "test") if (root / n).is_dir()), root / "val")
    for folder in (root / "train", test):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
    side = round(size * 8 / 7)

    def read(folder: Path, crop: int) -> Files:
        transform = v2.Compose([v2.Resize(side), v2.CenterCrop(crop), v2.PILToTensor()])
        return Files(torchvision.datasets.ImageFolder(str(folder), transform))

    train = read(root / "train", side)
    return Data(train, read(root / "train", size), read(test, size), train.samples.classes)
