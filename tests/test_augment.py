"""The augmentations: RandAugment's operations against PIL's, and the draws for each image."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from relssl.methods.augment import Augment
from relssl.methods.randaugment import OPERATIONS, RandAugment

SIZE = 32


def affine(*coefficients):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, coefficients)


# Name: a value, PIL's operation with it, the largest difference in levels, and the share of pixels that may
# differ more. PIL rounds an image's degenerate form, then truncates the blend: half a level of 0.6, and one.
# Where two pixels are almost equally near, PIL and a grid in [-1, 1] may select different ones.
CASES = {
    "autocontrast": (0.0, ImageOps.autocontrast, 1, 0),
    "brightness": (0.4, lambda i: ImageEnhance.Brightness(i).enhance(0.4), 1, 0),
    "colour": (0.4, lambda i: ImageEnhance.Color(i).enhance(0.4), 1.6, 0),
    "contrast": (0.4, lambda i: ImageEnhance.Contrast(i).enhance(0.4), 1, 0),
    "equalize": (0.0, ImageOps.equalize, 1, 0),
    "identity": (0.0, lambda i: i, 0, 0),
    "posterize": (5.0, lambda i: ImageOps.posterize(i, 5), 0, 0),
    "rotate": (24.0, lambda i: i.rotate(24), 0, 0.03),
    "sharpness": (0.4, lambda i: ImageEnhance.Sharpness(i).enhance(0.4), 1.6, 0),
    "shear x": (0.25, affine(1, 0.25, 0, 0, 1, 0), 0, 0.03),
    "shear y": (-0.25, affine(1, 0, 0, -0.25, 1, 0), 0, 0.03),
    "solarize": (128.0, lambda i: ImageOps.solarize(i, 128), 0, 0),
    "translate x": (0.25, affine(1, 0, 8, 0, 1, 0), 0, 0),
    "translate y": (-0.25, affine(1, 0, 0, 0, 1, -8), 0, 0),
}


def test_every_operation_has_a_case():
    assert list(OPERATIONS) == list(CASES) and len(CASES) == 14


@pytest.mark.parametrize("name", CASES)
def test_operations_equal_pils(name):
    value, pil, level, share = CASES[name]
    generator = np.random.default_rng(0)
    coarse = generator.integers(20, 230, (8, 8, 3)).astype(np.uint8)  # Smooth, and without the full range.
    picture = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    ours = OPERATIONS[name][0](x.clone(), torch.tensor(value).view(1, 1, 1, 1))[0].permute(1, 2, 0) * 255
    difference = np.abs(ours.numpy() - np.array(pil(picture), dtype=np.float32)).max(-1)
    assert ours.shape == (SIZE, SIZE, 3) and (difference > level + 1e-3).mean() <= share


def test_ranges_are_fixmatchs():
    """Strengths are 1 to 9 tenths of the range, plus the offset; posterize keeps 4 to 7 bits."""
    spans = {name: row[1:3] for name, row in OPERATIONS.items()}
    for name in ("brightness", "colour", "contrast", "sharpness"):
        assert spans[name] == (0.9, 0.05)
    for name in ("shear x", "shear y", "translate x", "translate y"):
        assert spans[name] == (0.3, 0)
    assert (spans["rotate"], spans["solarize"], spans["posterize"]) == ((30, 0), (256, 0), (4, 4))
    assert {name for name, row in OPERATIONS.items() if row[3]} == {
        "rotate", "shear x", "shear y", "translate x", "translate y",
    }  # fmt: skip


def test_randaugment_draws_for_each_image(monkeypatch):
    """Each operation is applied to its share of images, 5/14 of half, within five standard deviations."""
    seen = {name: [] for name in OPERATIONS}

    def noted(name, row):
        def run(x, value):
            seen[name] += value.flatten().tolist()
            return row[0](x, value)

        return (run, *row[1:])

    for name, row in OPERATIONS.items():
        monkeypatch.setitem(OPERATIONS, name, noted(name, row))
    count = 2000
    x = torch.rand(count, 3, 4, 4)
    y = RandAugment()(x)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    expected, deviation = count * 5 / 28, (count * 5 / 28) ** 0.5
    assert all(abs(len(values) - expected) < 5 * deviation for values in seen.values())
    assert set(seen["posterize"]) == {4, 5, 6, 7}
    assert set(seen["rotate"]) == {s * v for s in (-1, 1) for v in range(3, 28, 3)}
    assert set(seen["solarize"]) == {25, 51, 76, 102, 128, 153, 179, 204, 230}
    brightness = torch.tensor(sorted(set(seen["brightness"])))
    torch.testing.assert_close(brightness, 0.05 + 0.09 * torch.arange(1.0, 10))
    untouched = (y == x).all(-1).all(-1).all(-1).float().mean()
    assert 0.02 < untouched < 0.25  # (27/28)^5 for no operation at all would be 0.03; identity adds some


@pytest.mark.parametrize("randaugment", [0, 5])
def test_augmentation_follows_the_seed_and_differs_by_image(randaugment):
    same = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(6, -1, -1, -1)
    augment = Augment(16, torch.nn.Identity(), blur=True, randaugment=randaugment)

    def draw(seed):
        torch.manual_seed(seed)
        return augment(same)

    first = draw(0)
    assert first.shape == (6, 3, 16, 16)
    assert torch.equal(first, draw(0)) and not torch.equal(first, draw(1))
    assert len({tuple(x.flatten()[:50].tolist()) for x in first}) == 6
    with torch.autocast("cpu", dtype=torch.bfloat16):  # This must not round the coordinates of pixels.
        assert torch.equal(first, draw(0))
