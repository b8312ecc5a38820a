"""An image file as an image viewer shows it: 8 bits, RGB, upright.

16 bits are scaled to 8, palettes expanded, transparent pixels composited over white, CMYK and grey converted,
and EXIF's orientation is applied. Colour profiles (ICC) are not.
"""

from pathlib import Path

import numpy as np
from PIL import Image

# EXIF 2.32, table 6: how a stored image becomes upright, by the value of Orientation.
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
    """The first frame of an image file, mode RGB.

    Raises:
        ValueError: values without a known range (float outside [0, 1], integer outside 16 bits), or mode LAB.
        OSError, or nearly anything else that PIL raises: a damaged file.
    """
    with Image.open(path) as image:
        depth = image.tile[0][3] if image.tile else None
        if depth in ("L;2", "L;4") and "transparency" in image.info:
            # PIL spreads 2 or 4 bits over 8, but not the value that says which of them is transparent.
            most = 3 if depth == "L;2" else 15
            image.info["transparency"] = (image.info["transparency"] & most) * (255 // most)
        image.load()  # For TIFF this applies, and removes, the orientation.
        shown = _rgb(image)
        turn = UPRIGHT.get(_orientation(image))
    return shown if turn is None else shown.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        raise ValueError("its colours are LAB; expected RGB, CMYK, grey or a palette")
    if image.mode[0] in "IF":
        return _eight_bits(image).convert("RGB")
    if image.mode == "La":  # Premultiplied grey: PIL converts it to LA alone.
        image = image.convert("LA")
    if image.mode in ("P", "PA", "LA", "RGBA", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16-bit integers, or of floats in [0, 1], to 8 bits; the transparent value becomes white."""
    pixels = np.asarray(image)
    most = 1.0 if image.mode == "F" else 65535
    if not (pixels.min() >= 0 and pixels.max() <= most):  # NaN, too.
        raise ValueError(f"its values are from {pixels.min()} to {pixels.max()}; expected 0 to {most}")
    grey = np.rint(pixels * (255 / most)).astype(np.uint8)
    if "transparency" in image.info:
        grey[pixels == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) where there is none or where the EXIF block is damaged."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # The picture itself is whole: a viewer shows it as it lies.
        return 1
