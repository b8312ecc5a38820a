"""Image files of every mode, through a folder data set: the pixels that an image viewer shows."""

import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from relssl import datasets

SIDE = 32  # Training images of this size are neither resized nor cropped for image size 28.


def halves(left, right, mode=None, dtype=np.uint8):
    """Returns an image whose left half has one value, and whose right half another."""
    pixels = np.empty((SIDE, SIDE, *np.shape(left)), dtype)
    pixels[:, : SIDE // 2], pixels[:, SIDE // 2 :] = left, right
    return Image.fromarray(pixels) if mode is None else Image.frombytes(mode, (SIDE, SIDE), pixels.tobytes())


def palette():
    image = halves(0, 1, "P")
    image.putpalette([10, 20, 30, 200, 0, 0])
    return image


GREY16 = halves(100 * 257, 65535, dtype=np.uint16)
MODES = {
    "16-bit grey.png": (GREY16, {}, (100,) * 3, (255,) * 3),
    "16-bit grey.tif": (GREY16, {}, (100,) * 3, (255,) * 3),
    "integers of 32 bits.tif": (halves(25 * 257, 65535, dtype=np.int32), {}, (25,) * 3, (255,) * 3),
    "16-bit grey, a transparent value.png": (
        halves(100 * 257, 50 * 257, dtype=np.uint16),
        {"transparency": 25700},
        (255,) * 3,
        (50,) * 3,
    ),
    "float.tif": (halves(0.2, 1.0, dtype=np.float32), {}, (51,) * 3, (255,) * 3),
    "palette.png": (palette(), {}, (10, 20, 30), (200, 0, 0)),
    "palette, a transparent colour.png": (palette(), {"transparency": 1}, (10, 20, 30), (255,) * 3),
    # 128 of 255 of the colour, the rest white.
    "palette with alpha.png": (palette(), {"transparency": b"\xff\x80"}, (10, 20, 30), (227, 127, 127)),
    "alpha.png": (halves((200, 0, 0, 128), (1, 2, 3, 0)), {}, (227, 127, 127), (255,) * 3),
    "grey with alpha.png": (halves((200, 128), (200, 255), "LA"), {}, (227,) * 3, (200,) * 3),
    "a transparent colour.png": (
        halves((9, 8, 7), (1, 2, 3)),
        {"transparency": (1, 2, 3)},
        (9, 8, 7),
        (255,) * 3,
    ),
    "a transparent grey.png": (halves(9, 8), {"transparency": 8}, (9,) * 3, (255,) * 3),
    "cmyk.tif": (halves((255, 0, 0, 0), (0, 0, 0, 55), "CMYK"), {}, (0, 255, 255), (200,) * 3),
    "cmyk.jpg": (
        halves((255, 0, 0, 0), (0, 0, 0, 55), "CMYK"),
        {"quality": 100},
        (0, 255, 255),
        (200,) * 3,
    ),
    "one bit.png": (halves(0, 255).convert("1"), {}, (0,) * 3, (255,) * 3),
    "grey.png": (halves(77, 200), {}, (77,) * 3, (200,) * 3),
    "rgb.png": (halves((1, 2, 3), (4, 5, 6)), {}, (1, 2, 3), (4, 5, 6)),
}


def through_a_folder(root, name, save):
    """Returns the training image [3, 32, 32] of a folder data set with the one file that `save` writes."""
    for part in ("train", "val"):
        (root / part / "any").mkdir(parents=True)
        save(root / part / "any" / name)
    return datasets.load("folder", root, 28).train[[0]][0][0]


@pytest.mark.parametrize("name", MODES)
def test_modes(tmp_path, name):
    image, options, left, right = MODES[name]
    found = through_a_folder(tmp_path, name, lambda path: image.save(path, **options))
    assert found.shape == (3, SIDE, SIDE) and found.dtype == torch.uint8
    tolerance = 2 if name.endswith("jpg") else 0
    for half, expected in ((found[:, :, :15], left), (found[:, :, 17:], right)):
        difference = half.int() - torch.tensor(expected).view(3, 1, 1)
        assert difference.abs().max() <= tolerance, half[:, 0, 0]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_transparent_grey_of_few_bits(tmp_path, bits):
    """The PNG is written by hand, since PIL cannot; level 1 (left) is transparent, level 0 (right) is not."""
    row = (sum(1 << at for at in range(0, 8, bits)).to_bytes(1, "big") * (SIDE // 2 * bits // 8)).ljust(
        SIDE * bits // 8, b"\0"
    )

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = SIDE.to_bytes(4, "big") * 2 + bytes([bits, 0, 0, 0, 0])
    parts = (
        (b"IHDR", header),
        (b"tRNS", (1 + (8 << bits)).to_bytes(2, "big")),
        (b"IDAT", zlib.compress((b"\0" + row) * SIDE)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    found = through_a_folder(tmp_path, "a.png", lambda path: path.write_bytes(png))
    assert found[:, 0, :16].unique().tolist() == [255] and found[:, 0, 16:].unique().tolist() == [0]


def test_grey_of_12_bits(tmp_path):
    """A PGM file specifies its value of white."""
    values = np.full((SIDE, SIDE), 4095, ">u2")
    values[0] = 1365  # a third
    found = through_a_folder(
        tmp_path, "a.pgm", lambda path: path.write_bytes(b"P5 32 32 4095\n" + values.tobytes())
    )
    assert found[:, 0, 0].tolist() == [85] * 3 and found[:, 1, 0].tolist() == [255] * 3


@pytest.mark.parametrize("grey", [False, True])
def test_premultiplied_alpha(tmp_path, grey):
    """With TIFF's "associated" alpha, 200 at half opacity is stored as 100."""
    image = halves((100, 128), (0, 0), "LA") if grey else halves((100, 0, 0, 128), (0, 0, 0, 0))

    def save(path):
        image.save(path)
        separate = b"\x52\x01\x03\x00\x01\x00\x00\x00\x02"  # tag ExtraSamples: 2
        raw = path.read_bytes()
        assert raw.count(separate) == 1
        path.write_bytes(raw.replace(separate, separate[:-1] + b"\x01"))

    found = through_a_folder(tmp_path, "a.tif", save)
    expected = torch.tensor([227] * 3 if grey else [227, 127, 127])
    assert abs(found[:, 0, 0].int() - expected).max() <= 1
    assert found[:, 0, 31].tolist() == [255] * 3


@pytest.mark.parametrize("form", ["png", "jpg", "tif"])
@pytest.mark.parametrize("value", range(1, 9))
def test_orientation(tmp_path, value, form):
    """EXIF specifies the sides of the upright image on which the stored row 0 and column 0 are."""
    shown = np.zeros((SIDE, SIDE, 3), np.uint8)
    shown[:16, :16], shown[:16, 16:], shown[16:, :16] = 80, 160, 240
    row = ("top", "top", "bottom", "bottom", "left", "right", "right", "left")[value - 1]
    column = ("left", "right", "right", "left", "top", "top", "bottom", "bottom")[value - 1]
    stored = shown[::-1] if "bottom" in (row, column) else shown
    stored = stored[:, ::-1] if "right" in (row, column) else stored
    stored = stored.swapaxes(0, 1) if row in ("left", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"quality": 100} if form == "jpg" else {}
    image = Image.fromarray(np.ascontiguousarray(stored))
    found = through_a_folder(tmp_path, f"a.{form}", lambda path: image.save(path, exif=exif, **options))
    assert abs(found.int() - torch.from_numpy(shown).permute(2, 0, 1).int()).max() <= (form == "jpg")


def test_a_damaged_exif_block_is_ignored(tmp_path):
    image = halves((1, 2, 3), (4, 5, 6))
    block = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        found = through_a_folder(tmp_path, "a.png", lambda path: image.save(path, exif=block))
    assert found[:, 0, 0].tolist() == [1, 2, 3] and found[:, 0, 31].tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (halves(0.0, 200.0, dtype=np.float32), "its values are from 0.0 to 200.0; expected 0 to 1.0"),
        (halves(0.0, np.nan, dtype=np.float32), "its values are from nan to nan; expected 0 to 1.0"),
        (halves(-1, 70000, dtype=np.int32), "its values are from -1 to 70000; expected 0 to 65535"),
        (halves((1, 2, 3), (4, 5, 6), "LAB"), "its colours are LAB; expected RGB, CMYK, grey or a palette"),
    ],
)
def test_values_without_a_known_range_are_refused(tmp_path, image, message):
    with pytest.raises(ValueError, match=r"cannot read .*a\.tif: ") as error:
        through_a_folder(tmp_path, "a.tif", image.save)
    assert str(error.value).endswith(message)
