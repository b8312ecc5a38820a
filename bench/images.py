"""Rates at which one worker process reads the random crops of image files: relssl's loader and torchvision's.

    python bench/images.py --size 224 --views 2 [--root FOLDER]

The peers are DataLoaders of torchvision's ImageFolder with RandomResizedCrop, RandomHorizontalFlip and
PILToTensor: one decodes an image once for all views, one decodes it for each view. Every reader yields uint8
crops of the same sizes from one worker process with one thread. Rounds alternate between the readers; a round
reads all images once. Without --root (a folder of class folders), the images are JPEGs of 500 x 375 pixels,
quality 90, cut from scikit-learn's two photos.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from relssl.datasets import Crop
from relssl.datasets.decode import read_crops, read_rgb
from relssl.datasets.images import Files
from relssl.datasets.loading import Loader
from relssl.datasets.torchvision_import import torchvision

transforms = torchvision.transforms
BATCH = 32
SCALE = 0.2, 1.0  # ReSSL's shares of an image's area.


def make_jpegs(root: Path, count: int) -> None:
    """Writes JPEGs of 500 x 375 pixels to root/photos."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    generator = np.random.default_rng(0)
    (root / "photos").mkdir()
    for number in range(count):
        photo = photos[number % len(photos)]
        top, left = (
            generator.integers(side - cut + 1) for side, cut in zip(photo.shape[:2], (375, 500), strict=True)
        )
        image = Image.fromarray(photo[top : top + 375, left : left + 500])
        image.save(root / "photos" / f"{number:04}.jpg", quality=90)


def several(transform: Callable[[Any], Tensor], views: int, image: Any) -> list[Tensor]:
    return [transform(image) for _ in range(views)]


class DecodedPerView(torchvision.datasets.ImageFolder):
    """An ImageFolder that decodes an image for each of its views."""

    views = 1

    def __getitem__(self, index: int) -> Any:
        items = [super(DecodedPerView, self).__getitem__(index) for _ in range(self.views)]
        return [image for image, _ in items], items[0][1]


def readers(root: Path, size: int, views: int) -> dict[str, Callable[[], Iterable[Sequence[Tensor]]]]:
    """Returns functions that read all images of a folder, and yield batches of crops of each view."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    once = torchvision.datasets.ImageFolder(root, partial(several, transform, views))
    per_view = DecodedPerView(root, transform)
    per_view.views = views
    settings: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "batch_size": BATCH}
    peers = {
        "torchvision, decoding once": DataLoader(once, shuffle=True, **settings),
        "torchvision, decoding per view": DataLoader(per_view, shuffle=True, **settings),
    }
    files = Files(once.samples, read_rgb, read_crops)  # type: ignore[arg-type]  # Only crops are read.
    loader = Loader(files, 1, crops=[Crop(size, SCALE)] * views)

    def ours() -> Iterable[Sequence[Tensor]]:
        order = torch.randperm(len(files)).split(BATCH)
        return (batch.images for batch in loader.load([indices.tolist() for indices in order]))

    def theirs(name: str) -> Iterable[Sequence[Tensor]]:
        return (images for images, _ in peers[name])

    return {"relssl": ours, **{name: partial(theirs, name) for name in peers}}


def rate(read: Callable[[], Iterable[Sequence[Tensor]]], size: int, views: int) -> float:
    """Reads all images, and returns how many a second."""
    start, count = time.perf_counter(), 0
    for images in read():
        assert [view.shape[1:] for view in images] == [(3, size, size)] * views
        count += len(images[0])
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="side of the crops in pixels")
    parser.add_argument("--views", type=int, default=2, help="crops of each image")
    parser.add_argument("--root", type=Path, help="a folder of class folders of images")
    parser.add_argument("--rounds", type=int, default=7, help="times that all images are read")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.root is None:
            make_jpegs(Path(folder), 512)
        found = readers(options.root or Path(folder), options.size, options.views)
        shape = options.size, options.views
        for read in found.values():
            rate(read, *shape)  # Starts the worker, and reads the files from the disk.
        rounds = [{name: rate(read, *shape) for name, read in found.items()} for _ in range(options.rounds)]
    print(f"images a second of one worker, {options.views} views of {options.size} x {options.size} pixels")
    for name in found:
        ratios = [entry["relssl"] / entry[name] for entry in rounds]
        ratio = f"   relssl / this: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {name:31}{median(entry[name] for entry in rounds):7.0f}{ratio if name != 'relssl' else ''}")


if __name__ == "__main__":
    main()
