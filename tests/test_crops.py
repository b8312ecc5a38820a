"""Random crops of image files: pixels and boxes against torchvision's, and which draws an image gets."""

import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_image

from relssl import datasets
from relssl.datasets import Arrays, ConcatImages, Crop, Subset, decode
from relssl.datasets.decode import read_crops, read_rgb
from relssl.datasets.images import Files
from relssl.datasets.loading import Loader, default_workers, load_batches
from relssl.datasets.torchvision_import import torchvision
from relssl.methods import PRESETS
from relssl.methods.ressl import ReSSL
from relssl.methods.sacc import SACC
from relssl.train import epoch_batches, image_loaders

functional = torchvision.transforms.functional
get_params = torchvision.transforms.RandomResizedCrop.get_params
PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427
VIEWS = Crop(14, (0.2, 1.0)), Crop(9, (0.08, 0.4))


def expected(image, crop, key, view=0, multiple=1):
    """Returns the same crop [3, S, S] of a PIL image by torchvision, and the sides of its box.

    multiple: what the sides of the box are rounded to.
    """
    box, flip = crop.draw(*image.size, f"{key} {view}")
    rounded = ((side + multiple // 2) // multiple * multiple for side in box)
    left, top, right, bottom = map(min, rounded, image.size * 2)
    sides, size = (bottom - top, right - left), (crop.size, crop.size)
    found = functional.resized_crop(image, top, left, *sides, size, antialias=True)
    return functional.pil_to_tensor(functional.hflip(found) if flip else found), sides


@pytest.mark.parametrize("form", ["png", "jpg"])
@pytest.mark.parametrize("size", [(500, 375), (91, 300), (40, 33)])
def test_crops_are_those_of_torchvision(tmp_path, form, size):
    """Views of several sizes, of which one at least shrinks too little for a JPEG to be decoded reduced."""
    path = tmp_path / f"a.{form}"
    PHOTO.resize(size).save(path)
    image = Image.open(path).convert("RGB")
    crops = [Crop(side, (0.08, 1.0)) for side in (224, 7, 64, 160, 33)]
    differences = []
    for key in map(str, range(20)):
        for view, (crop, found) in enumerate(zip(crops, read_crops(path, crops, key), strict=True)):
            difference = (found.int() - expected(image, crop, key, view)[0].int()).abs()
            assert found.shape == (3, crop.size, crop.size) and difference.max() <= 1
            differences.append(difference.float().mean())
    assert sum(differences) / len(differences) < 0.05


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("side", "reduction"), [(150, 1), (80, 2), (40, 4), (20, 8)])
@pytest.mark.parametrize(("size", "mean", "largest"), [((640, 424), 1.5, 15), ((633, 417), 10, 80)])
def test_small_crops_of_a_jpeg(tmp_path, monkeypatch, size, mean, largest, side, reduction, orientation):
    """A box has at least 0.4 of the photo's area. A crop is displaced by less than a reduced pixel if the
    last of these lies partly beyond the photo.
    """
    exif = Image.Exif()
    exif[0x0112] = orientation
    PHOTO.crop((0, 0, *size)).save(tmp_path / "a.jpg", quality=90, exif=exif)
    image = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg").convert("RGB"))
    assert image.size == (size if orientation == 1 else size[::-1])
    reductions, decode_reduced = [], decode._decode_reduced

    def record(*arguments):
        reductions.append(decode_reduced(*arguments))
        return reductions[-1]

    monkeypatch.setattr(decode, "_decode_reduced", record)
    crop = Crop(side, (0.4, 1.0))
    for key in map(str, range(10)):
        (found,) = read_crops(tmp_path / "a.jpg", [crop], key)
        reference, box = expected(image, crop, key, multiple=reductions[-1])
        difference = (found.int() - reference.int()).abs().float()
        if reductions[-1] == 1:
            assert difference.max() <= 1
        else:
            assert 0 < difference.mean() <= mean and difference.max() <= largest
            assert min(box) / side > 1.45 * reductions[-1]
    assert Counter(reductions).most_common(1)[0][0] == reduction


@pytest.mark.parametrize("size", [(500, 375), (300, 800), (33, 32)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 0.4)])
def test_boxes_have_the_distribution_of_torchvision(size, scale):
    torch.manual_seed(0)
    image = Image.new("L", size)
    theirs = np.array([get_params(image, scale, [3 / 4, 4 / 3]) for _ in range(3000)])
    drawn = [Crop(9, scale).draw(*size, str(key)) for key in range(3000)]
    ours = np.array([(top, left, bottom - top, right - left) for (left, top, right, bottom), _ in drawn])
    for name, of in {
        "top": lambda top, left, height, width: top,
        "left": lambda top, left, height, width: left,
        "height": lambda top, left, height, width: height,
        "width": lambda top, left, height, width: width,
        "area": lambda top, left, height, width: height * width,
        "ratio": lambda top, left, height, width: width / height,
        "bottom": lambda top, left, height, width: top + height,
    }.items():
        assert ks_2samp(of(*theirs.T), of(*ours.T)).pvalue > 1e-3, name
    assert abs(np.mean([flip for _, flip in drawn]) - 0.5) < 4 * 0.5 / 3000**0.5
    assert abs(np.corrcoef([flip for _, flip in drawn], ours[:, 1])[0, 1]) < 4 / 3000**0.5


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (7, 200), (1, 1)])
def test_tiny_and_narrow_images(tmp_path, size):
    """Where no box fits, the crop is torchvision's central one."""
    PHOTO.resize(size).save(tmp_path / "a.png")
    image, crop = read_rgb(tmp_path / "a.png"), Crop(16, (0.6, 1.0), flip=False)
    top, left, height, width = get_params(image, (0.6, 1.0), [3 / 4, 4 / 3])
    box, flip = crop.draw(*size, "0")
    assert box == (left, top, left + width, top + height) and not flip
    (found,) = read_crops(tmp_path / "a.png", [crop], "0")
    assert (found.int() - expected(image, crop, "0")[0].int()).abs().max() <= 1


def test_a_flip_mirrors_the_same_box(tmp_path):
    PHOTO.save(tmp_path / "a.png")
    flips = 0
    for key in map(str, range(40)):
        mirrored, plain = (
            read_crops(tmp_path / "a.png", [Crop(32, (0.2, 1.0), flip=flip)], key)[0] for flip in (0.5, 0.0)
        )
        flip = Crop(32, (0.2, 1.0)).draw(*PHOTO.size, f"{key} 0")[1]
        assert torch.equal(mirrored, plain.flip(2) if flip else plain)
        assert not torch.equal(plain, plain.flip(2))
        flips += flip
    assert 10 <= flips <= 30


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey.png", PHOTO.convert("L")),
        ("16-bit grey.png", Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257)),
        ("palette.png", PHOTO.quantize(16)),
        ("alpha.png", Image.merge("RGBA", (*PHOTO.split(), PHOTO.convert("L")))),
        ("cmyk.jpg", PHOTO.convert("CMYK")),
        ("grey.jpg", PHOTO.convert("L")),
        ("rotated.tif", PHOTO),
    ],
)
def test_modes_are_converted_as_in_evaluation(tmp_path, name, image):
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / name, **({"exif": exif} if name == "rotated.tif" else {}))
    crop = Crop(200, (0.3, 0.8))
    (found,) = read_crops(tmp_path / name, [crop], "3")
    assert (found.int() - expected(read_rgb(tmp_path / name), crop, "3")[0].int()).abs().max() <= 1


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Returns a folder with 13 parts of a photo for training, JPEG and PNG, and 3 for testing."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(16):
        folder = root / ("train" if number < 13 else "val") / "any"
        folder.mkdir(parents=True, exist_ok=True)
        part = PHOTO.crop((20 * number, 10 * number, 20 * number + 90, 10 * number + 60))
        part.save(folder / f"{number:02}.{'jpg' if number % 2 else 'png'}")
    return root


def run(images, workers, epoch, start=0, seed=0):
    """Returns the crops of each image in an epoch's batches from `start` on, by the image's index."""
    settings = PRESETS["ressl"]["folder"]
    config = replace(settings, batch_size=3, workers=workers, seed=seed)
    with image_loaders({"train": images}, config, VIEWS, []) as loaders:
        batches = [batch for _, batch in epoch_batches(loaders, config, epoch, start)]
    assert [[view.shape for view in b.images] for b in batches] == [[(3, 3, 14, 14), (3, 3, 9, 9)]] * (
        4 - start
    )
    assert all(view.dtype == torch.uint8 for b in batches for view in b.images)
    return {int(i): views for b in batches for i, *views in zip(b.indices, *b.images, strict=True)}


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_seed_epoch_and_index_alone_determine_the_draws(photos):
    images = datasets.load("folder", photos, 14).train
    paths = [path for path, _ in images.samples]
    before = torch.get_rng_state()
    whole = run(images, 0, 5, seed=7)
    for workers, start in ((1, 0), (3, 0), (2, 2), (0, 3)):
        part = run(images, workers, 5, start, seed=7)
        assert len(part) == 3 * (4 - start)
        for index, views in part.items():
            assert all(map(torch.equal, views, whole[index]))
    assert torch.equal(torch.get_rng_state(), before)
    for index, views in whole.items():
        assert all(map(torch.equal, views, read_crops(paths[index], VIEWS, f"7 5 {index}")))
    for other in (run(images, 0, 6, seed=7), run(images, 0, 5, seed=8)):
        common = other.keys() & whole.keys()
        assert len(common) >= 9
        assert not any(
            torch.equal(one, two) for i in common for one, two in zip(other[i], whole[i], strict=True)
        )


def test_no_two_images_views_epochs_or_seeds_share_draws():
    keys = [f"{s} {e} {i} {v}" for s in range(2) for e in range(12) for i in range(123) for v in range(3)]
    boxes = [Crop(9, (0.08, 1.0)).draw(10**6, 10**6, key) for key in keys]
    assert len(set(boxes)) == len(keys) == 8856


def test_sets_of_sets_pass_crops_through(photos):
    """The index that determines the draws is that in the whole set. Arrays stay one tensor."""
    data = datasets.load("folder", photos, 14)
    images = Subset(ConcatImages(data.train, data.test), [15, 2, 7, 13])
    paths = [path for path, _ in (*data.train.samples, *data.test.samples)]
    (batch,) = load_batches(images, [[3, 0, 2]], 0, crops=VIEWS, seed=1, epoch=2)
    for position, (index, number) in enumerate(((3, 13), (0, 15), (2, 7))):
        views = read_crops(paths[number], VIEWS, f"1 2 {index}")
        assert all(torch.equal(b[position], view) for b, view in zip(batch.images, views, strict=True))
    pixels = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    arrays = ConcatImages(Arrays(pixels, torch.zeros(2).long()))
    (batch,) = load_batches(arrays, [[1, 0]], crops=VIEWS)
    assert torch.equal(batch.images, pixels[[1, 0]])
    with pytest.raises(
        ValueError, match="images of files and images in memory cannot be cropped in one batch"
    ):
        next(load_batches(ConcatImages(arrays, data.train), [[0]], crops=VIEWS))


def test_a_replacement_has_the_draws_of_the_image_it_replaces(photos, tmp_path):
    images = datasets.load("folder", photos, 14).train
    images.samples[4] = str(tmp_path / "missing.jpg"), 0
    skipped = []
    (batch,) = load_batches(images, [[2, 4]], 0, skipped, fill=True, crops=VIEWS, seed=3, epoch=1)
    shown = int(batch.indices[1])
    assert skipped == [images.samples[4][0]] and shown != 4
    for row, (number, index) in enumerate(((2, 2), (shown, 4))):
        views = read_crops(images.samples[number][0], VIEWS, f"3 1 {index}")
        assert all(torch.equal(b[row], view) for b, view in zip(batch.images, views, strict=True))


def process(*_):
    return [torch.tensor(os.getpid())]


def test_workers_persist_until_the_loader_is_closed():
    loader = Loader(Files([("", 0)] * 12, process, process), 2, crops=VIEWS[:1])
    batches = [[i] for i in range(12)]
    seen = [{int(b.images[0]) for b in loader.load(batches, epoch)} for epoch in range(2)]
    next(loader.load(batches, 2))  # An epoch that is left early, as at an error.
    seen.append({int(b.images[0]) for b in loader.load(batches, 3)})
    assert len(seen[0]) == 2 and seen[0] == seen[1] == seen[2] and os.getpid() not in seen[0]
    loader.close()
    for pid in seen[0]:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader.load(batches))


def test_workers_by_default(monkeypatch, command):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(13)), raising=False)
    assert default_workers() == 13
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers() == 1
    words = command("train", "ressl", "--help").stdout.replace("│", " ").split()
    assert "Default: the number of usable CPUs" in " ".join(words)


def test_crops_reach_the_borders_of_the_image(tmp_path):
    """The columns have the values 0 to 255, those of the central square 85 to 170."""
    columns = np.linspace(0, 255, 300).round().astype(np.uint8)
    (tmp_path / "train/any").mkdir(parents=True)
    Image.fromarray(np.tile(columns, (100, 1))).save(tmp_path / "train/any/0.png")
    images = datasets.load("folder", tmp_path, 16).train
    views = [next(load_batches(images, [[0]], 0, crops=VIEWS, epoch=e)).images[0] for e in range(60)]
    values = torch.stack(views)
    assert values.min() <= 12 and values.max() >= 243 and abs(values.double().mean() - 127.5) < 15
    central = images[[0]][0]
    assert central.min() > 80 and central.max() < 175


def test_a_method_gets_its_views_in_their_order(photos):
    """Each view's crop has the method's size and scale, and reaches the encoder unflipped and uncropped."""
    settings = {"data": "folder", "arch": "conv4", "image_size": 28, "batch_size": 4, "bn_splits": 1}
    config = replace(
        PRESETS["ressl"]["folder"], **settings, crops=3, queue_size=8, dim=8, hidden=8, flip=False
    )
    method = ReSSL(config, torch.zeros(3), torch.ones(3))
    sizes = [28, 28, 24, 20]
    assert [c.size for c in method.crops] == sizes
    np.testing.assert_allclose(
        [c.scale for c in method.crops], [(0.2 * s / 28, s / 28) for s in sizes], rtol=1e-12
    )
    assert not any(c.flip for c in method.crops)
    images = datasets.load("folder", photos, 28).train
    batch = next(load_batches(images, [[0, 1, 2, 3]], 0, crops=method.crops))
    seen, weak = [], []
    method.student["backbone"].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    method.teacher["backbone"].register_forward_pre_hook(lambda _, x: weak.append(x[0]))
    assert torch.isfinite(method(batch.images)[0])
    assert [x.shape[-1] for x in seen] == sizes[1:]
    assert torch.equal(weak[0], batch.images[0] / 255)  # The weak view consists of the crop alone.

    config = replace(
        PRESETS["sacc"]["folder"],
        arch="conv4",
        image_size=28,
        clusters=2,
        randaugment=0,
        crop_min=0.1,
        test_images=False,
    )
    method = SACC(config, torch.zeros(3), torch.ones(3))
    assert method.crops == (Crop(28, (0.1, 1.0)),) * 3
    for view in (method.weak, method.strong):
        view.jitter, view.grey, view.blur, view.normalize = None, 0.0, 0.0, None
    batch = next(load_batches(images, [[0, 1, 2, 3]], 0, crops=method.crops))
    seen = []
    method.net.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    assert torch.isfinite(method(batch.images)[0])
    assert (
        all(torch.equal(x, view / 255) for x, view in zip(seen, batch.images, strict=True)) and len(seen) == 3
    )
