"""Sets of uint8 images, indexed a batch at a time."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Images(Protocol):
    """A set of images: images[indices] -> uint8 [B, 3, H, W], labels int64 [B]; the label -1 means none."""

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
    """Unreadable(path, reason): an image file cannot be read. Both are strings, which can be pickled."""

    def __str__(self) -> str:
        return "cannot read {}: {}".format(*self.args)


class Files(Images):
    """Images that are read from files one by one; indexing raises Unreadable where one cannot be read.

    Args:
        samples: paths and labels.
        read: maps a path to uint8 [3, H, W], always of the same shape.
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
            except Exception as error:  # PIL raises almost any exception for a damaged file.
                raise Unreadable(path, str(error) or type(error).__name__) from error
        return torch.stack(images), torch.tensor([self.samples[i][1] for i in indices])


class Subset(Images):
    """The images of a set at the given indices."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.images[[self.indices[i] for i in indices]]


class IndexedSubset(Subset):
    """A subset whose "labels" [B, 2] are the labels and the indices in the whole set."""

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, labels = super().__getitem__(indices)
        return images, torch.stack((labels, torch.tensor([self.indices[i] for i in indices])), 1)


class ConcatImages(Images):
    """The concatenation of several sets whose images have the same shape."""

    def __init__(self, *parts: Images) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        offsets = torch.as_tensor(indices)
        positions, batches = [], []
        for part in self.parts:
            in_part = torch.nonzero((offsets >= 0) & (offsets < len(part))).flatten()
            if len(in_part):
                positions.append(in_part)
                batches.append(part[offsets[in_part].tolist()])
            offsets = offsets - len(part)
        order = torch.cat(positions).argsort()
        images, labels = (torch.cat(t)[order] for t in zip(*batches, strict=True))
        return images, labels


def reads_files(images: Images) -> bool:
    """Returns whether any of the images are read from files, which is worth worker processes."""
    if isinstance(images, Subset):
        return reads_files(images.images)
    if isinstance(images, ConcatImages):
        return any(map(reads_files, images.parts))
    return isinstance(images, Files)


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """Returns at most `limit` evenly spaced indices below `count`; all of them if limit is None."""
    return torch.linspace(0, count - 1, min(count, limit or count), dtype=torch.float64).long().tolist()
