"""`View` image by image against torchvision's functions and PIL, and what a training step needs of it."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch._inductor import metrics

from relssl.augment import Normalize, RandAugment, View, ViewParameters
from relssl.datasets.torchvision_import import torchvision  # noqa: F401, to be imported first

# isort: split
from torchvision.transforms import RandomCrop
from torchvision.transforms.v2 import functional as v2

LEVEL = 1 / 255
STRENGTHS = (0.4, 0.4, 0.4, 0.1)
STRONG = {"jitter": STRENGTHS, "grey": 0.2, "blur": 0.5}
NORMALIZE = Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
ADJUST = (v2.adjust_brightness, v2.adjust_contrast, v2.adjust_saturation, v2.adjust_hue)
NAMES = ("brightness", "contrast", "saturation", "hue")


def pictures(batch, height, width=None):
    """Returns parts of two photographs in turn with one image of noise: uint8 [batch, 3, height, width]."""
    size = (height, width or height)
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    images = [torch.randint(256, (3, *size), dtype=torch.uint8)]
    while len(images) < batch:
        scale = max(size) / int(torch.randint(min(max(size), 200), 400, ()))
        part = RandomCrop([min(int(side / scale), 400) for side in size])
        images.append(v2.resize(part(photographs[len(images) % 2]), list(size), antialias=True))
    return torch.stack(images)


def kernel_size(size):
    return max(3, size // 10 | 1)


def expected(size, image, p, n, cropped=False):
    """Augments one image, a float tensor or PIL's, with torchvision's functions."""
    if not cropped:
        box = [int(value) for value in (*p.start[n], *p.size[n])]
        image = v2.resized_crop(image, *box, [size, size], antialias=True)
        image = v2.hflip(image) if p.flip[n] else image
    if p.jitter is not None and p.jitter[n].any():
        for which in p.order[n].argsort().tolist():
            image = ADJUST[which](image, float(p.jitter[n, which]) + (which < 3))
    if p.grey is not None and p.grey[n]:
        image = v2.rgb_to_grayscale(image, 3)
    if p.sigma is not None and p.sigma[n]:
        image = v2.gaussian_blur(image, [kernel_size(size)] * 2, [float(p.sigma[n])] * 2)
    return image


def difference(view, images, p, cropped=False, pil=False):
    """Returns the absolute differences in levels from torchvision on float tensors or PIL's images."""
    rows = []
    for n, image in enumerate(images):
        if pil:
            row = expected(view.size, Image.fromarray(image.permute(1, 2, 0).numpy()), p, n, cropped)
            rows.append(torch.from_numpy(np.array(row)).permute(2, 0, 1) / 255)
        else:
            rows.append(expected(view.size, image / 255, p, n, cropped))
    ours = view(images, p, cropped=cropped)
    assert ours.dtype == torch.float32 and ours.shape == (len(images), 3, view.size, view.size)
    return (ours - torch.stack(rows)).abs() * 255


# Of equal size, shrinking, not square, as large as ImageNet's, and enlarging.
CROPS = [((32, 32), 32), ((96, 96), 64), ((64, 48), 40), ((224, 224), 224), ((20, 20), 56), ((40, 120), 33)]


@pytest.mark.parametrize("shape, size", CROPS)
def test_crop_equals_torchvisions(shape, size):
    view, images = View(size), pictures(24, *shape)
    p = view.draw(24, *shape, "cpu")
    assert 0 < p.flip.sum() < 24
    found = difference(view, images, p)
    assert found.max() <= 0.01


@pytest.mark.parametrize(
    "box", [(0, 0, 1, 1), (4, 6, 1, 1), (2, 3, 1, 4), (1, 0, 4, 1), (0, 0, 5, 7), (3, 5, 2, 2)]
)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_crop_of_small_boxes_and_to_small_sizes(box, size):
    view, images = View(size), pictures(2, 5, 7)
    drawn = [torch.tensor([row] * 2, dtype=torch.float32) for row in (box[:2], box[2:], 1.0)]
    p = ViewParameters(drawn[0], drawn[1], torch.tensor([0.0, 1.0]))
    assert difference(view, images, p).max() <= 0.01


@pytest.mark.parametrize("strengths", [STRENGTHS, (1.5, 1.5, 1.5, 0.5)])
@pytest.mark.parametrize("which", range(4), ids=NAMES)
def test_one_adjustment_equals_torchvisions(which, strengths):
    jitter = [strength * (n == which) for n, strength in enumerate(strengths)]
    view, images = View(32, jitter=jitter, jitter_probability=1.0), pictures(48, 32)
    found = difference(view, images, view.draw(48, 32, 32, "cpu"), cropped=True)
    assert found.max() <= (0.05 if which in (1, 2) else 0.01)


def test_jitter_equals_torchvisions_in_every_order():
    view, images = View(32, jitter=STRENGTHS, jitter_probability=1.0), pictures(48, 32)
    p = view.draw(48, 32, 32, "cpu")
    p = p._replace(order=torch.tensor([*itertools.permutations(range(4))] * 2))
    found = difference(view, images, p, cropped=True)
    assert found.max() <= 0.05


def test_grey_equals_torchvisions():
    """Its weights, 0.2989, 0.587 and 0.114, sum to 0.9999."""
    view, images = View(32, grey=1.0), pictures(16, 32)
    found = difference(view, images, view.draw(16, 32, 32, "cpu"), cropped=True)
    assert found.max() <= 0.026


@pytest.mark.parametrize("size", [2, 16, 32, 64, 224])
def test_blur_equals_torchvisions(size):
    view, images = View(size, blur=1.0), pictures(8, size)
    p = view.draw(8, size, size, "cpu")
    p.sigma[:2] = torch.tensor([0.1, 2.0])
    found = difference(view, images, p, cropped=True)
    assert found.max() <= 0.01


@pytest.mark.parametrize("shape, size", CROPS)
def test_strong_view_equals_torchvisions(shape, size):
    view, images = View(size, **STRONG), pictures(24, *shape)
    p = view.draw(24, *shape, "cpu")
    found = difference(view, images, p)
    assert found.max() <= 0.05
    normalized = View(size, **STRONG, normalize=NORMALIZE)(images, p)
    mean, std = (statistics.flatten().tolist() for statistics in (NORMALIZE.mean, NORMALIZE.std))
    torch.testing.assert_close(normalized, v2.normalize(view(images, p), mean, std), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "settings, mean, most", [({}, 0.3, 1.01), (STRONG, 1.4, 12.0)], ids=["weak", "strong"]
)
@pytest.mark.parametrize("shape, size", [((32, 32), 32), ((96, 96), 64), ((224, 224), 224)])
def test_is_close_to_pils_which_rounds_after_each_step(shape, size, settings, mean, most):
    view, images = View(size, **settings), pictures(24, *shape)
    found = difference(view, images, view.draw(24, *shape, "cpu"), pil=True)
    assert found.mean() <= mean and found.flatten().kthvalue(int(0.999 * found.numel())).values <= most


def test_randaugment_is_the_last_step_before_normalization():
    augment = RandAugment(2)
    view, images = View(32, **STRONG, randaugment=augment, normalize=NORMALIZE), pictures(16, 32)
    p = view.draw(16, 32, 32, "cpu")
    before = View(32, **STRONG)(images, p._replace(operations=None))
    levels = (before * 255).round()
    after = NORMALIZE(augment(levels, p.operations) / 255)
    found = (view(images, p) - after).abs()
    assert p.operations.shape == (2, 16) and found.max() <= 1e-5


WEAK = View(32, normalize=NORMALIZE)
VIEWS = {
    "weak": WEAK,
    "strong": View(32, **STRONG, normalize=NORMALIZE),
    "randaugment": View(32, **STRONG, randaugment=RandAugment(5), normalize=NORMALIZE),
}
each_view = pytest.mark.parametrize("name", VIEWS)


def seeded(view, images, seed=0):
    torch.manual_seed(seed)
    return view(images)


@each_view
def test_autocast_and_copies_change_nothing_and_seeds_repeat(name):
    view, images = VIEWS[name], pictures(8, 32)
    result = seeded(view, images)
    assert not result.requires_grad and not torch.equal(seeded(view, images, 1), result)
    for other in (view, copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert torch.equal(seeded(other, images), result)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(seeded(view, images), result)
    assert list(view.state_dict()) == ["normalize.mean", "normalize.std"] and not list(view.parameters())


@pytest.mark.parametrize("name", ["weak", "strong", pytest.param("randaugment", marks=pytest.mark.slow)])
def test_compiles_without_a_break_and_changes_nothing(name):
    view, images = VIEWS[name], pictures(8, 32)
    compiled = torch.compile(view, fullgraph=True, backend="aot_eager")
    assert torch.equal(seeded(compiled, images), seeded(view, images))


# Inductor's random numbers are others unless it is told to call torch's.
@pytest.mark.slow
@pytest.mark.parametrize("name, most", [("weak", 15), ("strong", 47)])
def test_inductor_changes_rounding_alone(name, most):
    torch._dynamo.reset()
    metrics.reset()
    view, images = VIEWS[name], pictures(8, 32)
    compiled = torch.compile(view, fullgraph=True, options={"fallback_random": True})
    found = ((seeded(compiled, images) - seeded(view, images)).abs() * NORMALIZE.std * 255).max()
    assert found <= 0.01 and metrics.generated_kernel_count <= most


@pytest.mark.parametrize("batch", [0, 1])
@each_view
def test_batches_of_none_and_one(name, batch):
    images = torch.zeros(batch, 3, 40, 33, dtype=torch.uint8)
    assert VIEWS[name](images).shape == (batch, 3, 32, 32)


def test_meta_device():
    images = torch.zeros(4, 3, 40, 33, dtype=torch.uint8, device="meta")
    assert copy.deepcopy(VIEWS["strong"]).to("meta")(images).shape == (4, 3, 32, 32)


def test_default_dtype_changes_nothing():
    images = pictures(4, 13)
    view = View(13, **STRONG)  # of a size that no other test has: its constants are cached
    torch.set_default_dtype(torch.float64)
    try:
        result = seeded(view, images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.dtype == torch.float32 and torch.equal(seeded(view, images), result)


IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: View(0), "size"),
        (lambda: View(2, randaugment=RandAugment()), "size"),
        (lambda: RandAugment(2.5), "operations"),
        (lambda: View(8, scale=(0, 1)), "scale"),
        (lambda: View(8, scale=(0.5, 0.1)), "scale"),
        (lambda: View(8, scale=(0.5, 1.1)), "scale"),
        (lambda: View(8, scale=(0.1, 0.2, 0.3)), "scale"),
        (lambda: View(8, ratio=(0, 1)), "ratio"),
        (lambda: View(8, ratio=(2, 1)), "ratio"),
        (lambda: View(8, flip=1.1), "flip"),
        (lambda: View(8, jitter=(0.1, 0.1, 0.1)), "jitter"),
        (lambda: View(8, jitter=(-0.1, 0.1, 0.1, 0.1)), "jitter"),
        (lambda: View(8, jitter=(0.1, 0.1, 0.1, 0.6)), "jitter"),
        (lambda: View(8, jitter=STRENGTHS, jitter_probability=-1), "jitter_probability"),
        (lambda: View(8, grey=float("nan")), "grey"),
        (lambda: View(8, blur=2), "blur"),
        (lambda: View(8, sigma=(0, 1)), "sigma"),
        (lambda: View(8, sigma=(2, 1)), "sigma"),
        (lambda: View(8)(IMAGES.float()), "images"),
        (lambda: View(8)(IMAGES[0]), "images"),
        (lambda: View(8)(IMAGES[:, :1]), "images"),
        (lambda: View(8)(IMAGES[..., :0]), "images"),
        (lambda: View(4)(IMAGES, cropped=True), "must be 4 x 4"),
        (lambda: View(8, ratio=(1, float("inf"))), "ratio"),
        (lambda: View(8, sigma=(1, float("inf"))), "sigma"),
        (lambda: View(8, jitter=(float("nan"), 0, 0, 0)), "jitter"),
        (lambda: View(8, jitter=(float("inf"), 0, 0, 0)), "jitter"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name) as raised:
        call()
    assert "\n" not in str(raised.value)
