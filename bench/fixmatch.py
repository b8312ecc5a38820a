"""FixMatch's code for RandAugment (Sohn et al., 2020), which SACC uses: PIL, one image at a time."""

import random

from PIL import Image, ImageEnhance, ImageOps

from relssl.augment.operations import OPERATIONS


def operation(name: str, strength: int, sign: int, image: Image.Image) -> Image.Image:
    """Applies one of OPERATIONS; sign is 1 or -1."""
    share, moved = strength * 0.9 / 10 + 0.05, sign * strength * 0.3 / 10

    def affine(*coefficients: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, coefficients)

    return {
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(share),
        "colour": lambda: ImageEnhance.Color(image).enhance(share),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(share),
        "equalize": lambda: ImageOps.equalize(image),
        "identity": lambda: image,
        "posterize": lambda: ImageOps.posterize(image, int(strength * 4 / 10) + 4),
        "rotate": lambda: image.rotate(sign * int(strength * 30 / 10)),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(share),
        "shear x": lambda: affine(1, moved, 0, 0, 1, 0),
        "shear y": lambda: affine(1, 0, 0, moved, 1, 0),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(strength * 256 / 10)),
        "translate x": lambda: affine(1, 0, int(moved * image.width), 0, 1, 0),
        "translate y": lambda: affine(1, 0, 0, 0, 1, int(moved * image.height)),
    }[name]()


class RandAugment:
    """Draws operations with replacement, and applies each with probability 1/2 at a strength from 1 to 9."""

    def __init__(self, operations: int) -> None:
        self.operations = operations

    def __call__(self, image: Image.Image) -> Image.Image:
        for name in random.choices(OPERATIONS, k=self.operations):
            strength, sign = random.randrange(1, 10), random.choice((1, -1))
            if random.random() < 0.5:
                image = operation(name, strength, sign, image)
        return image
