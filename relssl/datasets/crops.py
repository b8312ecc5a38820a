"""Random crops of images that are read from files, drawn by the worker process that reads them."""

import math
import random
from typing import NamedTuple

Box = tuple[int, int, int, int]  # left, top, right, bottom
ATTEMPTS = 10  # torchvision's: after as many boxes that do not fit, the crop is the central one.


class Crop(NamedTuple):
    """The random crop of a view: a box of the whole image, resized to a square, and perhaps mirrored.

    Attributes:
        size: side of the crop in pixels.
        scale: smallest and largest share of the image's area in the box.
        ratio: smallest and largest aspect ratio of the box, width by height.
        flip: share of the crops that are mirrored horizontally.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def draw(self, width: int, height: int, key: str) -> tuple[Box, bool]:
        """Draws a box, as torchvision's RandomResizedCrop does, and the flip.

        key: the seed of the draws, of which nothing else is a source.
        """
        # Of a generator's methods, only random() returns the same numbers in every version of Python.
        uniform = random.Random(key).random
        flip = uniform() < self.flip
        low, high = map(math.log, self.ratio)
        for _ in range(ATTEMPTS):
            area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * uniform())
            ratio = math.exp(low + (high - low) * uniform())
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int((width - w + 1) * uniform()), int((height - h + 1) * uniform())
                return (left, top, left + w, top + h), flip
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
        return (left, top, left + w, top + h), flip
