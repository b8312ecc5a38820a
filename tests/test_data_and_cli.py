"""Data sets by name, and the command line as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from relssl import data as datasets

SCRIPT = [sys.executable, "-c", "from relssl.cli import main; main()"]


def relssl(*arguments, cwd):
    return subprocess.run([*SCRIPT, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture
def archive(tmp_path):
    """An .npz of 80 + 40 images, 12 x 12, whose class is their colour."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 80), ("test", 40)):
        y = np.arange(count) % 2
        x = generator.integers(0, 60, (count, 12, 12, 3)).astype(np.uint8)
        x[..., 0] += (150 * y).astype(np.uint8)[:, None, None]
        arrays |= {f"{part}_x": x, f"{part}_y": y}
    np.savez(tmp_path / "mine.npz", **arrays)
    return tmp_path / "mine.npz"


def test_digits_are_all_there():
    data = datasets.load("digits", None, 16)
    assert (len(data.train), len(data.test), len(data.classes)) == (1437, 360, 10)
    images, labels = data.test[[0, 5, 7]]
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert images.max() > 200  # 16 grey levels spread over 0 to 255


def test_arrays(archive):
    data = datasets.load("arrays", archive, 12)
    raw = np.load(archive)
    images, labels = data.train[[3, 4]]
    assert np.array_equal(images.numpy(), raw["train_x"][[3, 4]].transpose(0, 3, 1, 2))
    assert labels.tolist() == raw["train_y"][[3, 4]].tolist()
    assert datasets.load("arrays", archive, 8).train[[0]][0].shape == (1, 3, 8, 8)
    mean, std = datasets.channel_statistics(data.train)
    pixels = raw["train_x"] / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-4)


def test_folder(tmp_path):
    from PIL import Image

    for part in ("train", "val"):
        for name, value in (("cat", 10), ("dog", 200)):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (50, 40), (value, 0, 0)).save(tmp_path / part / name / "0.png")
    data = datasets.load("folder", tmp_path, 28)
    assert data.classes == ["cat", "dog"]
    assert data.train[[0, 1]][0].shape == (2, 3, 32, 32)  # 8/7 of the size, to be cropped
    images, labels = data.test[[1]]
    assert images.shape == (1, 3, 28, 28) and int(images[0, 0, 5, 5]) == 200 and labels.tolist() == [1]


@pytest.mark.parametrize(
    ("name", "root", "error", "message"),
    [
        ("cifar10", None, ValueError, "data 'cifar10' needs a data root"),
        ("cifar10", "nowhere", FileNotFoundError, "no cifar10 under"),
        ("stl10", "nowhere", FileNotFoundError, "no stl10 under"),
        ("arrays", "nowhere.npz", FileNotFoundError, "no file"),
        ("folder", "nowhere", FileNotFoundError, "no folder"),
        ("mnist", "nowhere", ValueError, "data must be digits, cifar10"),
    ],
)
def test_missing_data(tmp_path, name, root, error, message):
    with pytest.raises(error, match=message):
        datasets.load(name, root and tmp_path / root, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_x": np.zeros((4, 8, 8, 3))}, r"train_x must be uint8 \[N, H, W, 3\], got float64"),
        ({"test_y": np.zeros(3, dtype=int)}, r"test_y must be integers \[4\]"),
        ({"test_x": None}, "lacks test_x"),
    ],
)
def test_bad_arrays(tmp_path, change, message):
    good = {f"{p}_x": np.zeros((4, 8, 8, 3), np.uint8) for p in ("train", "test")}
    good |= {f"{p}_y": np.zeros(4, dtype=int) for p in ("train", "test")}
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in (good | change).items() if v is not None})
    with pytest.raises(ValueError, match=message):
        datasets.load("arrays", tmp_path / "bad.npz", 8)


def test_train_and_evaluate(archive, tmp_path):
    settings = "--data arrays --arch conv4 --image-size 16 --epochs 2 --warmup-epochs 1 --batch-size 16"
    more = "--bn-splits 1 --queue-size 64 --dim 16 --hidden 32 --out run"
    run = relssl(
        "train", "ressl", *settings.split(), *more.split(), "--data-root", str(archive), cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    trained = json.loads(run.stdout)["trained encoder"]
    assert 0.9 <= trained["linear"] <= 1  # the classes differ in colour alone
    again = relssl("evaluate", "run/checkpoint.pt", "--baselines", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    scores = json.loads(again.stdout)
    assert scores["trained encoder"] == trained
    assert scores.keys() == {"trained encoder", "raw pixels", "untrained encoder"}
    refused = relssl("train", "ressl", *settings.split(), *more.split(), cwd=tmp_path)
    assert refused.returncode == 1 and "run/checkpoint.pt exists" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_help_shows_defaults_of_the_preset_and_their_sources(tmp_path):
    text = relssl("train", "ressl", "--data", "stl10", "--help", cwd=tmp_path).stdout
    words = " ".join(text.replace("│", " ").split())
    assert "16384" in words and "0.996" in words
    for option in [
        "--data",
        "--data-root",
        "--arch",
        "--epochs",
        "--batch-size",
        "--queue-size",
        "--dim",
        "--out",
        "--resume",
    ]:
        assert option in words
    assert words.count("[ReSSL") >= 10


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["fly"], 2, "usage: relssl COMMAND"),
        (["train", "magic"], 2, "usage: relssl train {ressl}"),
        (["train", "ressl", "--data", "cifar10"], 1, "relssl train: data 'cifar10' needs a data root"),
        (["evaluate", "nowhere.pt"], 1, "nowhere.pt"),
    ],
)
def test_bad_usage(tmp_path, arguments, status, message):
    run = relssl(*arguments, cwd=tmp_path)
    assert run.returncode == status and message in run.stderr and "Traceback" not in run.stderr


def test_info_needs_torch_and_numpy_only(tmp_path):
    block = "import sys\nfor name in ('tyro', 'kornia', 'torchvision', 'sklearn', 'matplotlib', 'tqdm'):\n"
    block += (
        "    sys.modules[name] = None\nsys.argv = ['relssl', 'info']\nfrom relssl.cli import main\nmain()"
    )
    run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for word in ("relssl", "torch", "chunked", "reference", "bfloat16", "CUDA C++"):
        assert word in run.stdout


def test_missing_extra_is_named(tmp_path):
    block = "import sys\nsys.modules['tyro'] = None\nsys.argv = ['relssl', 'train', 'ressl']\n"
    run = subprocess.run(
        [sys.executable, "-c", block + "from relssl.cli import main\nmain()"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 1 and "pip install 'relssl[train]'" in run.stderr


def test_console_script_is_installed():
    assert (Path(sys.executable).parent / "relssl").exists()
