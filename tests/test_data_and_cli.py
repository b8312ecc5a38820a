"""Data sets by name, and the command line."""

import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import relssl
from relssl import datasets
from relssl.checkpoint import read
from relssl.datasets.loading import channel_statistics


@pytest.fixture
def archive(tmp_path):
    """Returns an .npz of 80 + 40 images, 12 x 12, whose class is their colour."""
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
    mean, std = channel_statistics(data.train)
    pixels = raw["train_x"] / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-4)


def test_folder(tmp_path):
    for part in ("train", "val"):
        for name, value in (("cat", 10), ("dog", 200)):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (50, 40), (value, 0, 0)).save(tmp_path / part / name / "0.png")
    data = datasets.load("folder", tmp_path, 28)
    assert data.classes == ["cat", "dog"] and data.train.needs_workers
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
        ({"train_x": np.zeros((4, 8, 8, 3))}, r"bad.npz: train_x must be uint8 \[N, H, W, 3\], got float64"),
        ({"test_y": np.zeros(3, dtype=int)}, r"bad.npz: test_y must be integers \[4\]"),
        (
            {"train_x": np.zeros((4, 8, 8, 3), np.uint16)},
            r"got uint16 \(4, 8, 8, 3\): 16 bits; \(x / 257\)\.round\(\)\.astype\(np\.uint8\) scales them",
        ),
        (
            {"test_x": np.zeros((4, 8, 8), np.uint8)},
            r"test_x .* got uint8 \(4, 8, 8\): one channel; np\.repeat",
        ),
        ({"test_x": np.zeros((4, 8, 8, 1), np.uint8)}, r"got uint8 \(4, 8, 8, 1\): one channel; np\.repeat"),
        (
            {"train_x": np.zeros((4, 3, 8, 8), np.uint8)},
            r"got uint8 \(4, 3, 8, 8\): channels are first; x\.transpose\(0, 2, 3, 1\) puts them last$",
        ),
        ({"test_x": None}, "bad.npz lacks test_x"),
        ({"test_y": None}, "bad.npz lacks test_y"),
        ({"train_y": np.array([0, 1, -1, 0])}, "bad.npz: train_y must be from 0 to 1, got -1 to 1"),
        ({"test_y": np.full(4, 2), "classes": ["a", "b"]}, "bad.npz: test_y must be from 0 to 1, got 2 to 2"),
    ],
)
def test_bad_arrays(tmp_path, change, message):
    good = {f"{p}_x": np.zeros((4, 8, 8, 3), np.uint8) for p in ("train", "test")}
    good |= {f"{p}_y": np.arange(4) % 2 for p in ("train", "test")}
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in (good | change).items() if v is not None})
    with pytest.raises(ValueError, match=message):
        datasets.load("arrays", tmp_path / "bad.npz", 8)


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_damaged_archive_is_named(archive, keep):
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot read .*mine\.npz as an \.npz"):
        datasets.load("arrays", archive, 12)


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of 2 x 20 training and 2 x 2 test images of two classes."""
    for part, count in (("train", 20), ("val", 2)):
        for name, value in (("cat", 10), ("dog", 200)):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (40, 40), (value, 5 * number, 0))
                image.save(tmp_path / "pets" / part / name / f"{number:02}.png")
    return tmp_path / "pets"


def train_on(command, folder, *more):
    settings = "--data folder --arch conv4 --image-size 16 --epochs 1 --batch-size 20"
    where = "--workers", 1, "--data-root", folder, "--out", "run"
    return command("train", "sacc", *settings.split(), *where, *more)


def test_images_of_files_with_a_class_list(command, folder):
    """A list of names selects and orders the classes; a worker process loads the images."""
    assert train_on(command, folder).returncode == 0
    for part in ("train", "val"):
        (folder / part / "dog").rename(folder / part / "big dog")
    (folder / "chosen.txt").write_text("\n big dog\n")
    data = datasets.load("folder", folder, 16, classes=str(folder / "chosen.txt"))
    pickle.dumps(data.train)  # for workers that are not forked
    assert data.classes == ["big dog"] and (len(data.train), len(data.test)) == (20, 2)
    assert data.test[[0, 1]][1].tolist() == [0, 0]


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_an_unreadable_image_is_named_before_training(command, folder, damage):
    """All images of a small data set are read before training."""
    path = folder / "train/dog/13.png"
    path.write_bytes(path.read_bytes()[:60] if damage is None else damage)
    run = train_on(command, folder)
    assert run.returncode == 1 and f"relssl train: cannot read {path}" in run.stderr
    assert "Traceback" not in run.stderr and not (folder.parent / "run").exists()


def test_an_image_that_a_worker_cannot_read_is_named(command, folder, monkeypatch):
    """In a large data set it is found during training, of which nothing is lost."""
    statistics = torch.zeros(3), torch.ones(3)
    monkeypatch.setattr("relssl.train.channel_statistics", lambda *_: statistics)
    assert train_on(command, folder, "--eval-every", 0).returncode == 0
    path = folder / "train/dog/13.png"
    path.write_bytes(b"no image")
    run = train_on(command, folder, "--eval-every", 0, "--epochs", 2, "--resume")
    assert run.returncode == 1 and len(run.stderr.split("relssl train: ")[1].splitlines()) == 1
    assert f"relssl train: cannot read {path}" in run.stderr
    assert read(folder.parent / "run/checkpoint.pt")["epoch"] == 1


def test_missing_class_folders_are_named(command, folder):
    shutil.rmtree(folder / "val/dog")
    run = train_on(command, folder)
    assert run.returncode == 1 and f"no class folder {folder / 'val/dog'}" in run.stderr
    run = train_on(command, folder, "--classes", "imagenet-10")
    first = folder / "train/n02056570"
    assert run.returncode == 1 and f"no class folder {first} and 9 others" in run.stderr
    run = train_on(command, folder, "--classes", "imagenet-11")
    assert run.returncode == 1 and "imagenet-10, imagenet-dogs or a text file" in run.stderr


def test_arrays_of_two_sizes_become_one(tmp_path):
    arrays = {"train_x": np.zeros((4, 12, 10, 3), np.uint8), "test_x": np.zeros((3, 16, 16, 3), np.uint8)}
    np.savez(tmp_path / "two.npz", **arrays, train_y=np.arange(4), test_y=np.arange(3))
    data = datasets.load("arrays", tmp_path / "two.npz", 16)
    assert datasets.ConcatImages(data.train, data.test)[[0, 5]][0].shape == (2, 3, 10, 10)


def test_concatenated_sets_and_subsets_keep_order():
    parts = [datasets.Arrays(torch.full((n, 1), v), torch.arange(n)) for n, v in ((3, 7), (2, 8), (4, 9))]
    concatenated = datasets.ConcatImages(*parts)
    everything = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])
    rows = torch.randperm(9).tolist()
    for found, expected in zip(concatenated[rows], everything, strict=True):
        assert torch.equal(found, expected[rows])
    assert len(concatenated) == 9 and concatenated[[4]][0].tolist() == [[8]]
    assert datasets.Subset(concatenated, [8, 0])[[1, 0]][0].flatten().tolist() == [7, 9]


def test_evenly_spaced_indices_reach_both_ends_without_repeating():
    for count, most in ((5, 9), (9, 9), (10, 9), (1000, 7), (1, 1)):
        rows = datasets.evenly_spaced(count, most)
        assert len(rows) == len(set(rows)) == min(count, most) and (rows[0], rows[-1]) == (0, count - 1)


def test_cifar20_has_the_superclasses(tmp_path, monkeypatch):
    """The data are a small made-up CIFAR-100 in the format of the original files."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train", 30), ("test", 10)):
        fine = generator.integers(0, 100, count).tolist()
        pixels = generator.integers(0, 256, (count, 3072)).astype(np.uint8)
        file = {"data": pixels, "fine_labels": fine, "coarse_labels": [f // 5 for f in fine]}
        (folder / name).write_bytes(pickle.dumps(file))
    names = {"fine_label_names": [f"f{i}" for i in range(100)]}
    names["coarse_label_names"] = [f"c{i}" for i in range(20)]
    (folder / "meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr("torchvision.datasets.CIFAR100._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    fine, coarse = (datasets.load(name, tmp_path, 32) for name in ("cifar100", "cifar20"))
    for one, other in ((fine.train, coarse.train), (fine.test, coarse.test)):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels // 5, other.labels)
    assert coarse.classes == names["coarse_label_names"]


def test_train_and_evaluate(archive, command):
    settings = "--data arrays --arch conv4 --image-size 16 --epochs 2 --warmup-epochs 1 --batch-size 16"
    more = "--bn-splits 1 --queue-size 64 --dim 16 --hidden 32 --out run"
    run = command("train", "ressl", *settings.split(), *more.split(), "--data-root", str(archive))
    assert run.returncode == 0, run.stderr
    trained = json.loads(run.stdout)["trained encoder"]
    assert 0.9 <= trained["linear"] <= 1  # the classes differ in colour alone
    again = command("evaluate", "run/checkpoint.pt", "--baselines")
    assert again.returncode == 0, again.stderr
    scores = json.loads(again.stdout)
    assert scores["trained encoder"] == trained
    assert scores.keys() == {"trained encoder", "raw pixels", "untrained encoder"}
    refused = command("train", "ressl", *settings.split(), *more.split())
    assert refused.returncode == 1 and "run/checkpoint.pt exists" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_help_shows_defaults_of_the_preset_and_their_sources(command):
    text = command("train", "ressl", "--data", "stl10", "--help").stdout
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
        (["train", "magic"], 2, "no method 'magic', only ressl, sacc, distill, moco, simclr, cc"),
        (["train", "ressl", "--data", "cifar10"], 1, "relssl train: data 'cifar10' needs a data root"),
        (["evaluate", "nowhere.pt"], 1, "relssl evaluate: no file nowhere.pt"),
        (["train", "sacc", "--data", "digits", "--device", "abacus"], 1, "relssl train: no device 'abacus'"),
        (["export", "nowhere.pt", "out.pt"], 1, "relssl export: no file nowhere.pt"),
    ],
)
def test_bad_usage(command, arguments, status, message):
    run = command(*arguments)
    assert run.returncode == status and message in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ([], "usage: relssl COMMAND"),
        (["--version"], f"relssl {relssl.__version__}\n"),
        (["train"], "usage: relssl train {ressl,sacc,distill,moco,simclr,cc}"),
        (["train", "--help"], "relssl train ressl --help shows every setting"),
    ],
)
def test_what_is_asked_for_is_printed_to_stdout(command, arguments, printed):
    run = command(*arguments)
    assert (run.returncode, run.stderr) == (0, "") and printed in run.stdout


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("batch_size", 0, "at least 1"),
        ("epochs", 0, "at least 1"),
        ("queue_size", -1, "at least 0"),
        ("warmup_epochs", -1, "at least 0"),
        ("weight_decay", -1.0, "at least 0"),
        ("lr", math.nan, "at least 0"),
        ("momentum", 2.0, "from 0 to 1"),
        ("info_nce_weight", 3.0, "from 0 to 1"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(command, tmp_path, setting, value, wanted):
    option = f"--{setting.replace('_', '-')}"
    run = command("train", "ressl", "--data", "digits", "--out", tmp_path / "out", option, value)
    assert run.returncode == 1
    assert f"relssl train: {setting} must be {wanted}, got {value}" in run.stderr
    assert not (tmp_path / "out").exists()


def test_info_needs_torch_and_numpy_only(tmp_path):
    block = "import sys\nfor name in ('tyro', 'torchvision', 'sklearn', 'matplotlib', 'tqdm'):\n"
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
