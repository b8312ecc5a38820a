"""RandAugment: PIL's results for each operation, the draws, and what a training step needs of it."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from fixmatch import operation
from operations import count
from PIL import Image
from sklearn.datasets import load_sample_images
from torch._dynamo.testing import CompileCounterWithBackend

from relssl.augment import randaugment
from relssl.augment.operations import OPERATIONS
from relssl.augment.randaugment import RandAugment

SIGNED = ("rotate", "shear x", "shear y", "translate x", "translate y")


def pictures(height, width):
    """Two photographs, a smooth image without the full range, noise, constant channels, black and white."""
    size = (width, height)
    rng = np.random.default_rng(0)
    photographs = [np.array(Image.fromarray(i).resize(size)) for i in load_sample_images().images]
    coarse = Image.fromarray(rng.integers(60, 200, (7, 7, 3)).astype(np.uint8))
    smooth = np.array(coarse.resize(size, Image.Resampling.BICUBIC))
    noise = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    constant = photographs[0].copy()
    constant[..., 1:] = 77, 140
    black, white = np.zeros_like(noise), np.full_like(noise, 255)
    return [*photographs, smooth, noise, constant, black, white]


def batch(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()


def check_equals_pil(name, size, tolerated=0.0):
    """The share of differing pixels is at most `tolerated`."""
    images = pictures(*size)
    augment = RandAugment(1)
    for strength in range(1, 10):
        for sign in (1, -1) if name in SIGNED else (1,):
            draws = torch.full((1, len(images)), augment.index(name, strength, sign))
            ours = augment(batch(images), draws)
            expected = batch([operation(name, strength, sign, Image.fromarray(image)) for image in images])
            differs = (ours != expected).any(1).float().mean()
            assert differs <= tolerated, (strength, sign, differs)


# A square of CIFAR's size, wide and tall images, odd sides, and sides of which tenths are whole.
@pytest.mark.parametrize("size", [(32, 32), (40, 100), (53, 21), (3, 5)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_equals_pil_bit_by_bit(name, size):
    check_equals_pil(name, size)


@pytest.mark.parametrize("name", ["rotate", "shear x", "contrast", "equalize"])
def test_equals_pil_on_large_images(name):
    """Coordinates have 24 bits, PIL's also: a few pixels of a million are as near to one as to another."""
    check_equals_pil(name, (224, 200), 1e-4 if name == "rotate" else 0.0)


def test_equals_a_sequence_of_pils_operations():
    images = pictures(32, 48) * 40
    augment = RandAugment()
    draws = augment.draw(len(images), "cpu")
    meaning = {
        augment.index(name, s, sign): (name, s, sign)
        for name in OPERATIONS
        for s in range(1, 10)
        for sign in (1, -1)
    }
    expected = []
    for column, image in zip(draws.T.tolist(), images, strict=True):
        image = Image.fromarray(image)
        for draw in column:
            image = operation(*meaning[draw], image) if draw in meaning else image
        expected.append(image)
    assert torch.equal(augment(batch(images), draws), batch(expected))


def test_rounds_its_input():
    x = torch.tensor([0.4, 254.6, 17.5]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    augment = RandAugment(1)
    y = augment(x, torch.tensor([[augment.index("identity")]]))
    assert y[0, :, 0, 0].tolist() == [0, 255, 18]


def test_draws_are_uniform_and_independent():
    """Counts of 100,000 draws are within five standard deviations of those of FixMatch's code."""
    augment = RandAugment(operations=5)
    count = 20_000
    draws = augment.draw(count, "cpu")
    assert draws.shape == (5, count) and draws.dtype == torch.int64
    seen = Counter(draws.flatten().tolist())

    def close(events, probability):
        expected = draws.numel() * probability
        total = sum(seen[event] for event in events)
        return abs(total - expected) < 5 * (expected * (1 - probability)) ** 0.5

    def indices(names=OPERATIONS, strengths=range(1, 10), signs=(1, -1), applied=True):
        cases = itertools.product(names, strengths, signs)
        return [augment.index(*case, applied=applied) for case in cases]

    every = indices() + indices(applied=False)
    assert sorted(every) == list(range(len(every))) and len(every) == 504 and set(seen) <= set(every)
    assert close(indices(applied=False), 1 / 2)
    assert all(close(indices([name]), 1 / 28) for name in OPERATIONS)
    assert all(close(indices(strengths=[s]), 1 / 18) for s in range(1, 10))
    assert all(close(indices(signs=[sign]), 1 / 4) for sign in (1, -1))
    # Neither the images of a batch nor the draws of an image have draws in common more often than by chance.
    for same in (draws[:, 1:] == draws[:, :-1], draws[1:] == draws[:-1]):
        expected = same.numel() / 504
        assert abs(same.sum() - expected) < 5 * expected**0.5


def test_draws_that_are_not_applied_change_nothing():
    x = batch(pictures(24, 24))
    augment = RandAugment(1)
    for name in OPERATIONS:
        draws = torch.full((1, len(x)), augment.index(name, 9, applied=False))
        assert torch.equal(augment(x, draws), x)


def test_follows_the_seed_and_its_draws():
    x = torch.rand(1, 3, 20, 24).mul(255).expand(16, -1, -1, -1)
    augment = RandAugment()
    torch.manual_seed(1)
    drawn = augment(x)
    torch.manual_seed(1)
    draws = augment.draw(16, "cpu")
    assert torch.equal(drawn, augment(x, draws)) and torch.equal(drawn, augment(x, draws))
    assert not torch.equal(drawn, augment(x))
    assert len({image.numpy().tobytes() for image in drawn}) > 12
    assert not augment.state_dict()


@pytest.mark.parametrize("size", [(32, 32), (96, 70)])
def test_selecting_the_changed_images_changes_no_bit(size, monkeypatch):
    x = batch(pictures(*size) * 8)
    augment = RandAugment()
    draws = augment.draw(len(x), "cpu")
    results = []
    for large in (0, x.numel() + 1):
        monkeypatch.setattr(randaugment, "LARGE", large)
        selected = augment._changed(draws, x.numel())[0][0] is not None
        assert selected == (large == 0)
        results.append(augment(x, draws))
    assert torch.equal(*results)


def test_autocast_changes_nothing():
    x = batch(pictures(32, 40))
    augment = RandAugment()
    draws = augment.draw(len(x), "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = augment(x, draws)
    assert y.dtype == torch.float32 and torch.equal(y, augment(x, draws))


@pytest.mark.parametrize("large", [0, 2**40])
def test_number_of_operations_and_no_synchronization(large, monkeypatch):
    """Operations are kernels on a GPU. The selections are for the CPU, where time is not their number."""
    monkeypatch.setattr(randaugment, "LARGE", large)
    augment, x = RandAugment(), batch(pictures(32, 32))
    operations, synchronisations = count(lambda: augment(x))
    assert synchronisations == 0
    if large:
        assert operations == 224


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_once_without_a_break(backend):
    augment = RandAugment()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(augment, backend=counter, fullgraph=True)
    x = batch(pictures(20, 24))
    for _ in range(3):
        draws = augment.draw(len(x), "cpu")
        difference = (compiled(x, draws) - augment(x, draws)).abs()
        # Inductor contracts products and sums; what is rounded down afterwards may be a level less.
        assert difference.max() == 0 if backend == "aot_eager" else (difference > 0).float().mean() < 0.01
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: RandAugment(0), ValueError, "operations must be an integer of at least 1, got 0"),
        (lambda: RandAugment(strength=11), ValueError, "strength must be an integer from 2 to 10, got 11"),
        (
            lambda: RandAugment()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
            TypeError,
            "images must be float32",
        ),
        (lambda: RandAugment()(torch.zeros(2, 1, 8, 8)), ValueError, r"images must be \[B, 3, H, W\]"),
        (lambda: RandAugment()(torch.zeros(2, 3, 2, 8)), ValueError, "sides of 3 or more"),
        (lambda: RandAugment()(torch.zeros(2, 3, 8, 8), torch.zeros(5, 2)), TypeError, "draws must be int64"),
        (
            lambda: RandAugment()(torch.zeros(2, 3, 8, 8), torch.zeros(5, 3).long()),
            ValueError,
            r"\[5, 2\], not",
        ),
        (lambda: RandAugment().index("hue"), ValueError, "name must be one of autocontrast, "),
        (lambda: RandAugment().index("rotate", 10), ValueError, "strength must be from 1 to 9, not 10"),
        (lambda: RandAugment().index("rotate", 1, 0), ValueError, "sign must be 1 or -1, not 0"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
