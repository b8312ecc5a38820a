"""Sets of uint8 images, indexed a batch at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import default_collate  # In a worker process, it stacks into shared memory.

from relssl.datasets.crops import Crop

T = TypeVar("T")
Views = Tensor | tuple[Tensor, ...]


class Images:
    """A set of images: images[indices] -> uint8 [B, 3, H, W], labels int64 [B]; the label -1 means none.

    Attributes:
        needs_workers: whether worker processes should read the images, since that takes time.
    """

    needs_workers: bool = False

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def crop(
        self, indices: Sequence[int], crops: Sequence[Crop], keys: Sequence[str]
    ) -> tuple[Views, Tensor]:
        """Returns random crops, uint8 [B, 3, crop.size, crop.size] for each of `crops`, and labels.

        Only images of files are cropped: for others, it returns self[indices].

        keys: for each index, the seed of its draws.
        """
        return self[indices]


class Arrays(Images):
    """Images in memory, uint8 [N, 3, H, W], and their labels, int64 [N]; ValueError if the numbers differ."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if len(images) != len(labels):
            raise ValueError(f"there are {len(images)} images, but {len(labels)} labels")
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
        samples: paths, or what else the functions below take for one, and labels.
        read: maps a path to uint8 [3, H, W], always of the same shape.
        read_crops: maps a path, crops and the seed of their draws to a uint8 [3, S, S] for each crop.
    """

    needs_workers = True

    def __init__(
        self,
        samples: list[tuple[Any, int]],
        read: Callable[[Any], Tensor],
        read_crops: Callable[[Any, Sequence[Crop], str], list[Tensor]],
    ) -> None:
        self.samples, self.read, self.read_crops = samples, read, read_crops

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = [self._try(self.read, i) for i in indices]
        return default_collate(images), self._labels(indices)

    def crop(
        self, indices: Sequence[int], crops: Sequence[Crop], keys: Sequence[str]
    ) -> tuple[Views, Tensor]:
        views = [self._try(self.read_crops, i, crops, key) for i, key in zip(indices, keys, strict=True)]
        return tuple(default_collate(list(view)) for view in zip(*views, strict=True)), self._labels(indices)

    def _try(self, read: Callable[..., T], index: int, *arguments: object) -> T:
        path = self.samples[index][0]
        try:
            return read(path, *arguments)
        except Exception as error:  # PIL raises almost any exception for a damaged file.
            raise Unreadable(str(path), str(error) or type(error).__name__) from error

    def _labels(self, indices: Sequence[int]) -> Tensor:
        return torch.tensor([self.samples[i][1] for i in indices])


class Subset(Images):
    """The images of a set at the given indices."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices
        self.needs_workers = images.needs_workers

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.images[[self.indices[i] for i in indices]]

    def crop(
        self, indices: Sequence[int], crops: Sequence[Crop], keys: Sequence[str]
    ) -> tuple[Views, Tensor]:
        return self.images.crop([self.indices[i] for i in indices], crops, keys)


class IndexedSubset(Subset):
    """A subset whose "labels" [B, 2] are the labels and the indices in the whole set."""

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, labels = super().__getitem__(indices)
        return images, torch.stack((labels, torch.tensor([self.indices[i] for i in indices])), 1)


class ConcatImages(Images):
    """The concatenation of several sets whose images have the same shape."""

    def __init__(self, *parts: Images) -> None:
        self.parts = parts
        self.needs_workers = any(part.needs_workers for part in parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        positions, batches = [], []
        for part, in_part, rows in self._split(indices):
            positions += in_part
            batches.append(part[rows])
        shapes = {images.shape[1:]: None for images, _ in batches}
        if len(shapes) > 1:
            raise ValueError(f"images of one batch have shapes {', '.join(str(list(s)) for s in shapes)}")
        order = torch.tensor(positions).argsort()
        images, labels = (torch.cat(t)[order] for t in zip(*batches, strict=True))
        return images, labels

    def crop(
        self, indices: Sequence[int], crops: Sequence[Crop], keys: Sequence[str]
    ) -> tuple[Views, Tensor]:
        positions, batches = [], []
        for part, in_part, rows in self._split(indices):
            positions += in_part
            batches.append(part.crop(rows, crops, [keys[i] for i in in_part]))
        views, labels = zip(*batches, strict=True)
        cropped = {isinstance(view, tuple) for view in views}
        if len(cropped) > 1 or len({part.needs_workers for part in self.parts}) > 1:
            raise ValueError("images of files and images in memory cannot be cropped in one batch")
        order = torch.tensor(positions).argsort()
        if True in cropped:
            crop_by_crop = tuple(torch.cat(view)[order] for view in zip(*views, strict=True))
            return crop_by_crop, torch.cat(labels)[order]
        return torch.cat(views)[order], torch.cat(labels)[order]

    def _split(self, indices: Sequence[int]) -> Iterator[tuple[Images, list[int], list[int]]]:
        """Yields each part that contains images, their positions in `indices`, and their indices in it."""
        offsets = torch.as_tensor(indices)
        for part in self.parts:
            in_part = torch.nonzero((offsets >= 0) & (offsets < len(part))).flatten()
            if len(in_part):
                yield part, in_part.tolist(), offsets[in_part].tolist()
            offsets = offsets - len(part)


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """Returns at most `limit` evenly spaced indices below `count`; all of them if limit is None."""
    return torch.linspace(0, count - 1, min(count, limit or count), dtype=torch.float64).long().tolist()
