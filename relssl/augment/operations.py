"""The fourteen operations of FixMatch's RandAugment (Sohn et al., 2020), as coefficients of three steps.

The steps are a resampling, a table of the 256 levels and a blend with a degenerate image. Each operation is
one of them; the other two have the coefficients that change nothing.
"""

import math
from typing import NamedTuple

import numpy as np

OPERATIONS = (
    "autocontrast", "brightness", "colour", "contrast", "equalize", "identity", "posterize", "rotate",
    "sharpness", "shear x", "shear y", "solarize", "translate x", "translate y",
)  # fmt: skip


class Resampling(NamedTuple):
    """Takes each output pixel from the input pixel at matrix · (x, y) + shift."""

    matrix: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 0.0), (0.0, 1.0))
    centred: bool = False  # whether (x, y) is relative to the image's centre, not its upper left corner
    shift: tuple[float, float] = (0.0, 0.0)  # as shares of the width and the height, rounded to whole pixels


class Mapping(NamedTuple):
    """Replaces the levels of each channel by those of a table, or of one computed from its histogram."""

    table: tuple[float, ...] = tuple(range(256))
    stretch_above: float = math.inf  # Contrast is stretched if the range of the levels is larger than this.
    equalize_above: float = math.inf  # Levels are equalized if a step of the histogram is larger than this.


class Blending(NamedTuple):
    """Interpolates between a degenerate image (0) and the image (1)."""

    share: float = 1.0
    grey: float = 0.0  # 1 for the grey image as degenerate, 0 for the mean of it
    smooth: float = 0.0  # 1 for the smoothed image as degenerate instead


class Coefficients(NamedTuple):
    """The coefficients of an operation with a strength and a sign; these are the identity's."""

    resampling: Resampling = Resampling()
    mapping: Mapping = Mapping()
    blending: Blending = Blending()


def coefficients(name: str, strength: int, sign: int) -> Coefficients:
    """Returns those of one of OPERATIONS with a strength from 1 to 9, and a sign, 1 or -1, if it has one."""
    share, moved = strength * 0.9 / 10 + 0.05, sign * strength * 0.3 / 10
    match name:
        case "autocontrast":
            return Coefficients(mapping=Mapping(stretch_above=0))
        case "brightness":
            levels = np.arange(256, dtype=np.float32) * np.float32(share)  # PIL multiplies in float32
            return Coefficients(mapping=Mapping(tuple(np.floor(levels).tolist())))
        case "colour":
            return Coefficients(blending=Blending(share, grey=1))
        case "contrast":
            return Coefficients(blending=Blending(share))
        case "equalize":
            return Coefficients(mapping=Mapping(equalize_above=0))
        case "posterize":
            step = 2 ** (4 - strength * 4 // 10)
            return Coefficients(mapping=Mapping(tuple(v // step * step for v in range(256))))
        case "rotate":
            angle = math.radians(sign * (strength * 30 // 10))
            cos, sin = math.cos(angle), math.sin(angle)
            return Coefficients(Resampling(((cos, -sin), (sin, cos)), centred=True))
        case "sharpness":
            return Coefficients(blending=Blending(share, smooth=1))
        case "shear x":
            return Coefficients(Resampling(((1, moved), (0, 1))))
        case "shear y":
            return Coefficients(Resampling(((1, 0), (moved, 1))))
        case "solarize":
            threshold = 256 - strength * 256 // 10
            return Coefficients(mapping=Mapping(tuple(v if v < threshold else 255 - v for v in range(256))))
        case "translate x":
            return Coefficients(Resampling(shift=(moved, 0)))
        case "translate y":
            return Coefficients(Resampling(shift=(0, moved)))
    return Coefficients()
