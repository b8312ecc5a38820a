"""Batches of a data set in a given order; worker processes read the images of files."""

import random
import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from relssl.datasets.images import Images, Unreadable, evenly_spaced, reads_files

# Draws of a replacement for one image: if half of all images are unreadable, all fail once in 10^30.
MAX_DRAWS = 100


class Batch(NamedTuple):
    """Images uint8 [B, 3, H, W], labels int64 [B], and indices int64 [B] of these images in their set."""

    images: Tensor
    labels: Tensor
    indices: Tensor


def load_batches(
    images: Images,
    batches: Sequence[list[int]],
    workers: int = 2,
    skipped: list[str] | None = None,
    fill: bool = False,
) -> Iterator[Batch]:
    """Yields the batch of each list of indices; a replacement has its own index.

    It draws no numbers from torch's global generators.

    Args:
        skipped: where the paths of unreadable images are appended, which are skipped; with None, an
            unreadable image raises ValueError.
        fill: whether another image replaces an unreadable one. The index of the latter alone determines
            which, so a batch is the same in every run and process. Otherwise batches shrink, and empty ones
            are skipped.

    Raises:
        ValueError: neither an image nor any replacement can be read; the message names its file.
    """
    use_workers = len(batches) > 1 and reads_files(images)  # A worker reads a single batch no sooner.
    loader: DataLoader = DataLoader(
        _ReturnErrors(images, skipped is not None, fill),  # type: ignore[arg-type]
        sampler=batches, batch_size=None, generator=torch.Generator(),  # type: ignore[arg-type]
        num_workers=workers if use_workers else 0, worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    for result in loader:
        if isinstance(result, ValueError):
            raise result
        batch, paths = result
        if skipped is not None:
            skipped += paths
        if len(batch.images):
            yield batch


class _ReturnErrors:
    """Returns errors instead of raising them: DataLoader would wrap an error in its worker's traceback.

    An item consists of the batch of a list of indices, and the paths of unreadable images.
    """

    def __init__(self, images: Images, skip: bool, fill: bool) -> None:
        self.images, self.skip, self.fill = images, skip, fill

    def __getitem__(self, indices: list[int]) -> tuple[Batch, list[str]] | ValueError:
        try:
            return Batch(*self.images[indices], torch.tensor(indices)), []
        except ValueError as error:
            return self._one_by_one(indices) if self.skip and isinstance(error, Unreadable) else error

    def _one_by_one(self, indices: list[int]) -> tuple[Batch, list[str]] | Unreadable:
        items, paths = [], []
        for index in indices:
            generator = random.Random(index)
            for _ in range(MAX_DRAWS if self.fill else 1):
                try:
                    items.append(Batch(*self.images[[index]], torch.tensor([index])))
                    break
                except Unreadable as error:
                    paths.append(error.args[0])
                    last = error
                    index = generator.randrange(len(self.images))
            else:
                if self.fill:
                    return Unreadable(last.args[0], f"{MAX_DRAWS - 1} replacements are unreadable, too")
        if not items:
            return Batch(*(torch.empty(0) for _ in Batch._fields)), paths
        return Batch(*map(torch.cat, zip(*items, strict=True))), paths


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

    skipped: see `load_batches`; ValueError if no image can be read.
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
