"""Images from NumPy arrays, and the data set of an .npz file."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from relssl.datasets.data import Data
from relssl.datasets.images import Arrays


def resized(images: np.ndarray, labels: np.ndarray, size: int) -> Arrays:
    """Converts uint8 images [N, H, W, 3] and labels [N], resized to size x size."""
    tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    if tensor.shape[-2:] != (size, size):
        parts = [F.interpolate(t, (size, size), mode="bilinear", antialias=True) for t in tensor.split(1024)]
        tensor = torch.cat(parts)
    return Arrays(tensor, torch.from_numpy(labels.astype(np.int64)))


def resized_down(images: np.ndarray, labels: np.ndarray, size: int) -> Arrays:
    """Converts uint8 images [N, H, W, 3] and labels [N], made square with sides of at most `size`."""
    return resized(images, labels, min(size, *images.shape[1:3]))


def load_arrays(path: Path, size: int) -> Data:
    """Loads an .npz with train_x and, optionally, train_y, test_x with test_y, and classes.

    Images are uint8 [N, H, W, 3], labels integers [N].
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read {path} as an .npz: {error}") from error
    # Labels need their images, and test images are used only with labels.
    needed = {"train_x"} | ({"test_x", "test_y"} if arrays.keys() & {"test_x", "test_y"} else set())
    missing = needed - arrays.keys()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it has {', '.join(arrays)}")
    images = {part: arrays[f"{part}_x"] for part in ("train", "test") if f"{part}_x" in arrays}
    labels = {part: arrays[f"{part}_y"] for part in images if f"{part}_y" in arrays}
    for part, x in images.items():
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
            got = f"{x.dtype} {x.shape}{_advice(x)}"
            raise ValueError(f"{path}: {part}_x must be uint8 [N, H, W, 3], got {got}")
    for part, y in labels.items():
        count = len(images[part])
        if y.shape != (count,) or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"{path}: {part}_y must be integers [{count}], got {y.dtype} {y.shape}")
    num_labels = max((int(y.max()) + 1 for y in labels.values()), default=0)
    names = [str(c) for c in arrays.get("classes", range(num_labels))]
    for part, y in labels.items():
        if y.min() < 0 or y.max() >= len(names):
            found = f"{y.min()} to {y.max()}"
            raise ValueError(f"{path}: {part}_y must be from 0 to {len(names) - 1}, got {found}")
    size = min(size, *(side for x in images.values() for side in x.shape[1:3]))
    sets = {part: resized(x, labels.get(part, np.full(len(x), -1)), size) for part, x in images.items()}
    train, test = sets["train"], sets.get("test")
    labelled, unlabelled = (train, None) if "train" in labels else (None, train)
    return Data(train, labelled, test, names if labels else [], unlabelled)


def _advice(x: np.ndarray) -> str:
    """Returns how to convert images of another known form to the expected one."""
    if x.ndim == 4 and x.shape[1] == 3 != x.shape[3]:
        return ": channels are first; x.transpose(0, 2, 3, 1) puts them last"
    if x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 1):
        return ": one channel; np.repeat(x.reshape(*x.shape[:3], 1), 3, axis=3) makes three of it"
    if x.dtype == np.uint16:
        return ": 16 bits; (x / 257).round().astype(np.uint8) scales them to 8"
    return ""
