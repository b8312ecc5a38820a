"""Batches of a data set in a given order; worker processes read the images of files."""

import os
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from relssl.datasets.crops import Crop
from relssl.datasets.images import Images, Unreadable, Views, evenly_spaced

T = TypeVar("T")

# Draws of a replacement for one image: if half of all images are unreadable, all fail once in 10^30.
MAX_DRAWS = 100


class Batch(NamedTuple):
    """Images uint8 [B, 3, H, W], labels int64 [B], and indices int64 [B] of these images in their set.

    With crops of images that are read from files, `images` is a tuple of a uint8 [B, 3, S, S] for each crop.
    """

    images: Any
    labels: Tensor
    indices: Tensor


def default_workers() -> int:
    """Returns the number of CPUs that each process of torchrun on this machine has, at least 1."""
    # The affinity is what a container or a job may use; macOS has none.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def load_batches(
    images: Images,
    batches: Sequence[list[int]],
    workers: int = 2,
    skipped: list[str] | None = None,
    fill: bool = False,
    crops: Sequence[Crop] | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> Iterator[Batch]:
    """Yields the batch of each list of indices, read by worker processes that then end; see `Loader`."""
    # A worker reads a single batch no sooner.
    loader = Loader(images, workers if len(batches) > 1 else 0, skipped, fill, crops, seed)
    with closing(loader):
        yield from loader.load(batches, epoch)


class Loader:
    """Loads batches of a set of images. It draws no numbers from torch's global generators.

    Its worker processes wait for the next call of `load` until `close`, or until they are no longer referred
    to. Images in memory need none.

    Args:
        skipped: where the paths of unreadable images are appended, which are skipped; with None, an
            unreadable image raises ValueError.
        fill: whether another image replaces an unreadable one. The index of the latter alone determines
            which, so a batch is the same in every run and process. Otherwise batches shrink, and empty ones
            are skipped.
        crops: random crops to take of each image that is read from a file. Seed, epoch, index and the crop's
            position alone determine what is drawn; a replacement's index is that of the image it replaces.
        first: the index of the set's first image in the batches, of those of several sets.
    """

    def __init__(
        self,
        images: Images,
        workers: int = 2,
        skipped: list[str] | None = None,
        fill: bool = False,
        crops: Sequence[Crop] | None = None,
        seed: int = 0,
        first: int = 0,
    ) -> None:
        self.images, self.skipped = images, skipped
        files = images.needs_workers
        workers = workers if files else 0
        self.requests: list[tuple[list[int], int]] = []  # Indices in the set, and epoch.
        self.loader: DataLoader | None = DataLoader(
            _Reader(images, skipped is not None, fill, crops if files else None, seed, first),  # type: ignore
            sampler=self.requests, batch_size=None, generator=torch.Generator(),  # type: ignore[arg-type]
            num_workers=workers, persistent_workers=workers > 0, worker_init_fn=_ignore_signals,
            collate_fn=_unchanged, pin_memory=torch.cuda.is_available(),
        )  # fmt: skip

    def load(self, batches: Sequence[list[int]] | Tensor, epoch: int = 0) -> Iterator[Batch]:
        """Yields the batch of each list of indices in the set; a replacement has its own index.

        Raises:
            ValueError: neither an image nor any replacement can be read; the message names its file.
        """
        if self.loader is None:
            raise ValueError("the loader is closed")
        if isinstance(batches, Tensor):
            batches = batches.tolist()
        self.requests[:] = [(indices, epoch) for indices in batches]
        for result in self.loader:
            if isinstance(result, ValueError):
                raise result
            batch, paths = result
            if self.skipped is not None:
                self.skipped += paths
            if len(batch.indices):
                yield batch

    def close(self) -> None:
        """Ends the worker processes. Otherwise Python would wait at exit for them, as they ignore SIGTERM."""
        self.loader = None


class _Reader:
    """Returns errors instead of raising them: DataLoader would wrap an error in its worker's traceback.

    An item consists of the batch of a list of indices and an epoch, and the paths of unreadable images.
    """

    def __init__(
        self, images: Images, skip: bool, fill: bool, crops: Sequence[Crop] | None, seed: int, first: int
    ) -> None:
        self.images, self.skip, self.fill = images, skip, fill
        self.crops, self.seed, self.first = crops, seed, first

    def __getitem__(self, request: tuple[list[int], int]) -> tuple[Batch, list[str]] | ValueError:
        indices, epoch = request
        try:
            return self._read(indices, indices, epoch), []
        except ValueError as error:
            return self._one_by_one(indices, epoch) if self.skip and isinstance(error, Unreadable) else error

    def _read(self, indices: list[int], drawn_for: list[int], epoch: int) -> Batch:
        """Reads images, with the draws of the images `drawn_for`."""
        images: Views
        if self.crops is None:
            images, labels = self.images[indices]
        else:
            keys = [f"{self.seed} {epoch} {self.first + index}" for index in drawn_for]
            images, labels = self.images.crop(indices, self.crops, keys)
        for read in (*images, labels) if isinstance(images, tuple) else (images, labels):
            if len(read) != len(indices):
                found = f"{len(read)} images or labels for {len(indices)} indices"
                raise ValueError(f"a set of images returned {found}")
        return Batch(images, labels, torch.tensor(indices) + self.first)

    def _one_by_one(self, indices: list[int], epoch: int) -> tuple[Batch, list[str]] | Unreadable:
        items, paths = [], []
        for index in indices:
            shown = index
            generator = random.Random(index)
            for _ in range(MAX_DRAWS if self.fill else 1):
                try:
                    items.append(self._read([shown], [index], epoch))
                    break
                except Unreadable as error:
                    paths.append(error.args[0])
                    last = error
                    shown = generator.randrange(len(self.images))
            else:
                if self.fill:
                    return Unreadable(last.args[0], f"{MAX_DRAWS - 1} replacements are unreadable, too")
        if not items:
            return Batch(*(torch.empty(0) for _ in Batch._fields)), paths
        images, labels, shown_indices = zip(*items, strict=True)
        cropped = isinstance(images[0], tuple)
        views = tuple(map(torch.cat, zip(*images, strict=True))) if cropped else torch.cat(images)
        return Batch(views, torch.cat(labels), torch.cat(shown_indices)), paths


def _unchanged(item: T) -> T:
    """Replaces a function of DataLoader that converts tuples to lists."""
    return item


def skipped_message(paths: Sequence[str]) -> str:
    """Returns a line with the number of the unreadable images of `load_batches`, and the first of them."""
    names = list(dict.fromkeys(paths))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"unreadable images skipped: {len(names)} ({', '.join(names[:3])}{more})"


def _ignore_signals(_: int) -> None:
    """Leaves signals to a group of processes to the parent, whose end also ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def channel_statistics(images: Images, skipped: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Computes mean and standard deviation [3] by channel, in [0, 1], of at most 10,000 evenly spaced images.

    skipped: see `Loader`; ValueError if no image can be read.
    """
    indices = evenly_spaced(len(images), 10_000)
    total = torch.zeros(2, 3, dtype=torch.float64)
    pixels = 0
    batches = [indices[i : i + 512] for i in range(0, len(indices), 512)]
    for batch in load_batches(images, batches, skipped=skipped):
        x = batch.images.double() / 255
        total += torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
        pixels += x.numel() // 3
    if not pixels:
        raise ValueError(f"no image can be read; {skipped_message(skipped or [])}")
    mean, square = total / pixels
    return mean.float(), (square - mean**2).clamp_min(1e-6).sqrt().float()
