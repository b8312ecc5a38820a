"""Batches of a data set in a given order; processes of their own read those that come from files."""

import random
import signal
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from relssl.data import Images, Unreadable, reads_files


def load_batches(
    images: Images,
    batches: Sequence[list[int]],
    workers: int = 2,
    skipped: list[str] | None = None,
    fill: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 [B, 3, H, W] and labels [B] of each list of indices.

    It draws nothing from torch's global generators.

    Args:
        skipped: unreadable images are left out, and their paths appended here; None: they raise ValueError.
        fill: another image takes the place of one left out, drawn by nothing but the index of the latter, so
            that a batch is the same in every run and process. Without, a batch gets smaller, and one of which
            nothing is left is left out.

    Raises:
        ValueError: an image cannot be read, or none that could take its place; the message names its file.
    """
    several = len(batches) > 1 and reads_files(images)  # One is not read any sooner by another process.
    loader: DataLoader = DataLoader(
        _Caught(images, skipped is not None, fill),  # type: ignore[arg-type]
        sampler=batches, batch_size=None, generator=torch.Generator(),  # type: ignore[arg-type]
        num_workers=workers if several else 0, worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    for found in loader:
        if isinstance(found, ValueError):
            raise found
        batch, labels, paths = found
        if skipped is not None:
            skipped += paths
        if len(batch):
            yield batch, labels


class _Caught:
    """Images whose errors come as values; raised in a worker, they would come wrapped in its traceback.

    An item is the images and labels of a list of rows, and the paths of those left out.
    """

    def __init__(self, images: Images, skip: bool, fill: bool) -> None:
        self.images, self.skip, self.fill = images, skip, fill

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor, list[str]] | ValueError:
        try:
            return *self.images[rows], []
        except ValueError as error:
            return self._one_by_one(rows) if self.skip and isinstance(error, Unreadable) else error

    def _one_by_one(self, rows: list[int]) -> tuple[Tensor, Tensor, list[str]] | Unreadable:
        found, paths = [], []
        for row in rows:
            draw = random.Random(row)
            for _ in range(TRIES if self.fill else 1):
                try:
                    found.append(self.images[[row]])
                    break
                except Unreadable as error:
                    paths.append(error.args[0])
                    last = error
                    row = draw.randrange(len(self.images))
            else:
                if self.fill:
                    return Unreadable(
                        last.args[0], f"{TRIES - 1} others, drawn for its place, are unreadable, too"
                    )
        if not found:
            return torch.empty(0), torch.empty(0), paths
        images, labels = (torch.cat(t) for t in zip(*found, strict=True))
        return images, labels, paths


# Images that are drawn for one place in a batch: where half of them are unreadable, all fail once in 10^30.
TRIES = 100


def left_out(paths: Sequence[str]) -> str:
    """A line about the unreadable images of `load_batches`: how many, and the first of them."""
    names = list(dict.fromkeys(paths))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"unreadable images left out: {len(names)} ({', '.join(names[:3])}{more})"


def _ignore_signals(_: int) -> None:
    """Signals often reach a whole group of processes: the parent decides, and a worker ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def channel_statistics(images: Images, skipped: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] by channel, in [0, 1], of at most 10,000 images spread over the set.

    skipped: see `load_batches`; ValueError where no image can be read.
    """
    some = spread(len(images), 10_000)
    total = torch.zeros(2, 3, dtype=torch.float64)
    pixels = 0
    batches = [some[i : i + 512] for i in range(0, len(some), 512)]
    for batch, _ in load_batches(images, batches, skipped=skipped):
        x = batch.double() / 255
        total += torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
        pixels += x.numel() // 3
    if not pixels:
        raise ValueError(f"no image can be read; {left_out(skipped or [])}")
    mean, square = total / pixels
    return mean.float(), (square - mean**2).clamp_min(1e-6).sqrt().float()


def spread(count: int, most: int | None) -> list[int]:
    """At most `most` indices below `count`, evenly spread; all of them where they are not more, or None."""
    return torch.linspace(0, count - 1, min(count, most or count), dtype=torch.float64).long().tolist()
