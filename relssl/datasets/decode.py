"""Decodes an image file, or random crops of it, as an image viewer would: 8 bits, RGB, upright.

16 bits are scaled to 8, palettes expanded, transparent pixels composited over white, CMYK and grey converted,
and EXIF's orientation is applied. Colour profiles (ICC) are ignored.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from relssl.datasets.crops import Box, Crop

Source = str | Path | bytes | BinaryIO | Image.Image | np.ndarray
"""A path, the bytes of an encoded image, a file object, an image, or an array uint8 [H, W] or [H, W, 3]."""

# EXIF 2.32, table 6: what turns a stored image upright, by the value of Orientation.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPED = (5, 6, 7, 8)  # Those of them that exchange width and height.

# How much a box must still shrink after a JPEG is decoded at a fraction of its size. The decoder averages
# blocks of pixels, which is sharper than antialiasing: without a margin, crops of a detailed photo differ
# from those of the full size by up to 4 of 255 in the mean, with this one by up to 1.3.
MARGIN = 1.5


@contextmanager
def _open(source: Source) -> Iterator[Image.Image]:
    """Opens an image, and closes it and a file object, but not an image of the caller's."""
    if isinstance(source, np.ndarray):
        shaped = source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)
        if source.dtype != np.uint8 or not source.size or not shaped:
            got = f"{source.dtype} {list(source.shape)}"
            raise ValueError(f"an array must be uint8 [H, W] or [H, W, 3], got {got}")
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        yield source
    elif isinstance(source, (str, Path)):
        with Image.open(source) as image:
            yield image
    elif not (isinstance(source, bytes) or hasattr(source, "read")):
        forms = "a path, a file object, bytes, an image of PIL or an array"
        raise ValueError(f"an image must be {forms}, got {type(source).__name__}")
    else:
        with io.BytesIO(source) if isinstance(source, bytes) else source as file, Image.open(file) as image:
            yield image


def read_rgb(source: Source) -> Image.Image:
    """Returns the first frame of an image file, in mode RGB.

    Raises:
        ValueError: values without a known range (float outside [0, 1], integer outside 16 bits), or mode LAB.
        OSError, or almost any other exception of PIL: a damaged file.
    """
    with _open(source) as image:
        return _upright_rgb(image)


def read_square(source: Source, side: int, crop: int) -> Tensor:
    """Returns the central square, uint8 [3, crop, crop], of an image whose shorter side is resized to `side`.

    Raises:
        See `read_rgb`.
    """
    from relssl.datasets.torchvision_import import torchvision  # noqa: F401  isort: skip
    from torchvision.transforms import v2  # The first import makes this one possible.

    image = v2.functional.resize(read_rgb(source), [side])
    return v2.functional.pil_to_tensor(v2.functional.center_crop(image, [crop]))


def read_crops(source: Source, crops: Sequence[Crop], key: str) -> list[Tensor]:
    """Returns a random crop, uint8 [3, S, S] (S = crop.size), of a file's first frame for each of `crops`.

    The file is decoded once. A box is drawn on the whole upright image, and resized with antialiasing by
    torch, in a third of PIL's time; values differ from PIL's by at most 1. A JPEG whose boxes all shrink by
    at least 3 in both directions is decoded at half its size (by 6: at a quarter, by 12: at an eighth), and
    the boxes are rounded to its pixels (see MARGIN).

    Args:
        key: the seed of all draws; each crop adds its position to it.

    Raises:
        See `read_rgb`.
    """

    def draw(width: int, height: int) -> list[tuple[Box, bool]]:
        return [crop.draw(width, height, f"{key} {view}") for view, crop in enumerate(crops)]

    with _open(source) as image:
        reduction = 1
        # The caller's image must keep its size.
        if is_jpeg := image.format in ("JPEG", "MPO") and image is not source:
            swapped = _orientation(image) in SWAPPED
            drawn = draw(*(image.size[::-1] if swapped else image.size))
            shrinkage = (
                min(right - left, bottom - top) / crop.size
                for ((left, top, right, bottom), _), crop in zip(drawn, crops, strict=True)
            )
            reduction = _decode_reduced(image, min(shrinkage))
        rgb = _upright_rgb(image)
    if not is_jpeg:  # Only loading turns a TIFF upright.
        drawn = draw(*rgb.size)
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    views = []
    for (box, flip), crop in zip(drawn, crops, strict=True):
        left, top, right, bottom = ((side + reduction // 2) // reduction for side in box)
        part = pixels[None, :, top:bottom, left:right]
        view = F.interpolate(part, (crop.size, crop.size), mode="bilinear", antialias=True)[0]
        views.append(view.flip(2) if flip else view)
    return views


def _decode_reduced(image: Image.Image, shrinkage: float) -> int:
    """Makes a JPEG decode at 1/8, 1/4 or 1/2 of its size, of which a box that shrinks uses enough pixels.

    Returns 8, 4 or 2, or 1 for its full size.
    """
    for reduction in (8, 4, 2):
        size = image.width // reduction, image.height // reduction
        if MARGIN * reduction <= shrinkage and image.draft(None, size):
            return reduction
    return 1


def _upright_rgb(image: Image.Image) -> Image.Image:
    tile = getattr(image, "tile", None)  # Only an image of a file has it.
    depth = tile[0][3] if tile else None
    if depth in ("L;2", "L;4") and "transparency" in image.info:
        # PIL scales 2 or 4 bits to 8, but not the value that is transparent.
        largest = 3 if depth == "L;2" else 15
        image.info["transparency"] = (image.info["transparency"] & largest) * (255 // largest)
    image.load()  # For TIFF, PIL applies and removes the orientation here.
    rgb = _rgb(image)
    transpose = UPRIGHT.get(_orientation(image))
    return rgb if transpose is None else rgb.transpose(transpose)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        raise ValueError("its colours are LAB; expected RGB, CMYK, grey or a palette")
    if image.mode[0] in "IF":
        return _eight_bits(image).convert("RGB")
    if image.mode == "La":  # Premultiplied grey, which PIL converts only to LA.
        image = image.convert("LA")
    if image.mode in ("P", "PA", "LA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales grey 16-bit integers, or floats in [0, 1], to 8 bits; the transparent value becomes white."""
    pixels = np.asarray(image)
    largest = 1.0 if image.mode == "F" else 65535
    if not (pixels.min() >= 0 and pixels.max() <= largest):  # NaN fails, too.
        raise ValueError(f"its values are from {pixels.min()} to {pixels.max()}; expected 0 to {largest}")
    grey = np.rint(pixels * (255 / largest)).astype(np.uint8)
    if "transparency" in image.info:
        grey[pixels == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation, or 1 (upright) if there is none or the EXIF block is damaged."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # The image itself is intact: a viewer shows it unrotated.
        return 1
