"""Decodes an image file as an image viewer would: 8 bits, RGB, upright.

16 bits are scaled to 8, palettes expanded, transparent pixels composited over white, CMYK and grey converted,
and EXIF's orientation is applied. Colour profiles (ICC) are ignored.
"""

from pathlib import Path

import numpy as np
from PIL import Image

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


def read_rgb(path: str | Path) -> Image.Image:
    """Returns the first frame of an image file, in mode RGB.

    Raises:
        ValueError: values without a known range (float outside [0, 1], integer outside 16 bits), or mode LAB.
        OSError, or almost any other exception of PIL: a damaged file.
    """
    with Image.open(path) as image:
        depth = image.tile[0][3] if image.tile else None
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
    return image.convert("RGB")


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
