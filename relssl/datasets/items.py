"""Images that a function opens one by one: of a data set of Hugging Face, a tar file, a database."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from relssl.datasets.crops import Crop
from relssl.datasets.images import Files


class Items(Files):
    """Images that worker processes open and decode one by one, as those of a folder.

    Indexing resizes each image, its shorter side to 8/7 of `size`, and cuts it to its central square of side
    `size`; random crops are taken from the whole image. Where worker processes do not fork (on macOS and
    Windows), sources and `open` must be picklable, and `open` be no lambda.

    Args:
        sources: what `open` needs of each image, such as range(N), or paths; error messages name it.
        labels: an integer for each image, -1 for none; None for no labels.
        size: side of the images, which `make` gets.
        open: maps a source to a path, a file object, which is closed after reading, the bytes of an encoded
            image, an image of PIL, or an array uint8 [H, W] or [H, W, 3].
    """

    def __init__(
        self, sources: Sequence[Any], labels: Sequence[int] | None, size: int, open: Callable[[Any], Any]
    ) -> None:
        if labels is not None and len(labels) != len(sources):
            raise ValueError(f"there are {len(sources)} sources, but {len(labels)} labels")
        numbers = [-1] * len(sources) if labels is None else [int(label) for label in labels]
        samples = list(zip(sources, numbers, strict=True))
        super().__init__(samples, partial(_read, open, size), partial(_read_crops, open))


def _read(open: Callable[[Any], Any], size: int, source: Any) -> Tensor:
    from relssl.datasets.decode import read_square

    return read_square(open(source), round(size * 8 / 7), size)


def _read_crops(open: Callable[[Any], Any], source: Any, crops: Sequence[Crop], key: str) -> list[Tensor]:
    from relssl.datasets.decode import read_crops

    return read_crops(open(source), crops, key)
