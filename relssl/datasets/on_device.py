"""Images in memory that lie on the training device, where a batch is a selection without synchronisation."""

from collections.abc import Iterator
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from relssl.datasets.images import Arrays, ConcatImages, Images
from relssl.datasets.loading import Batch

DataDevice = Literal["auto", "cpu", "device"]
SHARE = 4  # "auto" fills at most a quarter of a GPU's free memory with images.


class OnDevice(Arrays):
    """Images of one or several sets of `Arrays`, copied to a device; on a CPU those of one set are shared."""

    def __init__(self, parts: list[Arrays], device: torch.device) -> None:
        if len(parts) == 1:
            super().__init__(parts[0].images.to(device), parts[0].labels.to(device))
            return
        # Part by part into memory of the final size: torch.cat would need twice as much.
        count, shape = sum(map(len, parts)), parts[0].images.shape[1:]
        images = torch.empty(count, *shape, dtype=torch.uint8, device=device)
        labels = torch.empty(count, dtype=torch.int64, device=device)
        for to, own in (images, [p.images for p in parts]), (labels, [p.labels for p in parts]):
            for piece, tensor in zip(to.split([len(p) for p in parts]), own, strict=True):
                piece.copy_(tensor)
        super().__init__(images, labels)


class DeviceLoader:
    """The counterpart of `Loader` for images on a device.

    first: the index of the set's first image in the batches, of those of several sets.
    """

    def __init__(self, images: OnDevice, first: int = 0) -> None:
        self.images, self.first = images, first

    def load(self, batches: Tensor, epoch: int = 0) -> Iterator[Batch]:
        """Yields the batch of each row of indices [steps, B], which are copied to the device all at once."""
        images, labels = self.images.images, self.images.labels
        device, order = images.device, batches.contiguous()
        if device.type == "cuda":
            order = order.pin_memory()  # so that the copy does not wait for the device
        order = order.to(device, non_blocking=True)
        for own, indices in zip(order, order + self.first, strict=True):
            yield Batch(images.index_select(0, own), labels.index_select(0, own), indices)


def move_to_device(passes: dict[str, Images], where: DataDevice, device: torch.device) -> dict[str, Images]:
    """Returns the sets of images, with those in memory on the device, if `where` says so.

    where: "cpu" moves nothing, "device" everything in memory, and "auto" that to a GPU if it takes less than
        a quarter of its free memory.
    """
    in_memory = {name: parts for name, images in passes.items() if (parts := arrays_of(images))}
    if where == "auto":
        size = sum(p.images.nbytes for parts in in_memory.values() for p in parts)
        fits = device.type == "cuda" and SHARE * size < torch.cuda.mem_get_info(device)[0]
    if where == "cpu" or (where == "auto" and not fits):
        return passes
    return passes | {name: OnDevice(parts, device) for name, parts in in_memory.items()}


def arrays_of(images: Images) -> list[Arrays]:
    """Returns the arrays that a set of images consists of; none if others are among them."""
    if isinstance(images, ConcatImages):
        parts = [arrays_of(part) for part in images.parts]
        return list(chain(*parts)) if all(parts) else []
    return [images] if isinstance(images, Arrays) else []
