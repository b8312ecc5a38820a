"""Batches of a data set in a given order; processes of their own read those that come from files."""

import signal
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from relssl.data import Images, reads_files


def load_batches(
    images: Images, batches: Sequence[list[int]], workers: int = 2
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 [B, 3, H, W] and labels [B] of each list of indices.

    It draws nothing from torch's global generators.

    Raises:
        ValueError: an image cannot be read; the message names its file.
    """
    loader: DataLoader = DataLoader(
        _Caught(images), sampler=batches, batch_size=None, generator=torch.Generator(),  # type: ignore[arg-type]
        num_workers=workers if reads_files(images) else 0, worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    for found in loader:
        if isinstance(found, ValueError):
            raise found
        yield found


class _Caught:
    """Images whose errors come as values; raised in a worker, they would come wrapped in its traceback."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor] | ValueError:
        try:
            return self.images[rows]
        except ValueError as error:
            return error


def _ignore_signals(_: int) -> None:
    """Signals often reach a whole group of processes: the parent decides, and a worker ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def channel_statistics(images: Images) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] by channel, in [0, 1], of at most 10,000 images spread over the set."""
    some = spread(len(images), 10_000)
    total = torch.zeros(2, 3, dtype=torch.float64)
    pixels = 0
    for batch, _ in load_batches(images, [some[i : i + 512] for i in range(0, len(some), 512)]):
        x = batch.double() / 255
        total += torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
        pixels += x.numel() // 3
    mean, square = total / pixels
    return mean.float(), (square - mean**2).clamp_min(1e-6).sqrt().float()


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread; all of them where they are not more."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).long().tolist()
