"""Data sets from Python: a module of ten lines, tar shards, objects, workers, resuming, errors."""

import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from resuming import assert_same, train_until

from relssl import datasets
from relssl.checkpoint import load_method, read
from relssl.datasets.decode import read_square
from relssl.datasets.loading import Loader, load_batches
from relssl.evaluate import baselines, evaluate
from relssl.methods import PRESETS
from relssl.methods.ressl import ReSSL
from relssl.train import train

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = replace(
    PRESETS["ressl"]["digits"], image_size=8, batch_size=256, epochs=2, eval_every=1, hidden=32, dim=16,
    queue_size=256, workers=2,
)  # fmt: skip
# As a user would write it for a data set that gives an image of PIL and a label for each index.
MODULE = """
from sklearn.datasets import load_digits
from PIL import Image
from relssl.datasets import Data, Items

DIGITS = load_digits()

def image(index):
    return Image.fromarray((16 * DIGITS.images[index]).clip(0, 255).astype("uint8"))

def make(size):
    train, test = (Items(part, DIGITS.target[part], size, image) for part in (range(1400), range(1400, 1797)))
    return Data(train, train, test, list("0123456789"))
"""


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("mine", "tar_shards", "hf_dataset"):
            del sys.modules[name]


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    return "mine.py:make"


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDS", str(tmp_path / "shards"))
    subprocess.run([sys.executable, str(EXAMPLES / "tar_shards.py")], check=True)
    return f"{EXAMPLES / 'tar_shards.py'}:make"


def interrupted(config):
    """Trains into the second epoch, of 5 steps or a few more."""
    assert 1 < train_until(8, ReSSL, config).epoch < 2


@pytest.mark.parametrize("source", ["mine", "shards", "hf"])
def test_trains_resumes_and_evaluates_from_another_folder(source, request, tmp_path, monkeypatch):
    if source == "hf":
        pytest.importorskip("datasets")
        name = f"{EXAMPLES / 'hf_dataset.py'}:make"
    else:
        name = request.getfixturevalue(source)
    config = replace(SMALL, data=name)
    whole = train(replace(config, out=tmp_path / "whole"))
    interrupted(replace(config, out=tmp_path / "part"))
    (tmp_path / "elsewhere").mkdir()
    if source == "mine":
        assert read(tmp_path / "part")["config"]["data"] == f"{tmp_path / 'mine.py'}:make"
    monkeypatch.chdir("elsewhere")
    _, saved = load_method(tmp_path / "part", "cpu")
    resumed = train(replace(saved, resume=True, out=tmp_path / "part"))
    assert_same(whole, resumed)
    assert evaluate(resumed, saved)["knn"] > 0.5


def test_keys_of_shards_end_at_the_first_dot_of_the_name(shards):
    """Not at one of the folder."""
    make = datasets.python.load_python
    flat = make(shards, 16).train[list(range(20))]
    for path in Path(os.environ["SHARDS"]).glob("train-0.tar"):
        with tarfile.open(path) as old, tarfile.open("new.tar", "w") as new:
            for member in old.getmembers():
                content = old.extractfile(member)
                member.name = f"v1.0/{member.name}"
                new.addfile(member, content)
        shutil.move("new.tar", path)
    for found, expected in zip(make(shards, 16).train[list(range(20))], flat, strict=True):
        assert torch.equal(found, expected)


def test_a_moved_module_resumes(mine, capsys):
    interrupted(replace(SMALL, data=mine))
    shutil.move("mine.py", "moved.py")
    with pytest.raises(FileNotFoundError, match=r"no file .*mine\.py"):
        train(replace(SMALL, data=mine, resume=True))
    train(replace(SMALL, data="moved.py:make", resume=True))
    assert "data was " in capsys.readouterr().err


class Own:
    """A set of a class that knows nothing of relssl."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        return self.images[indices]


def test_objects_train_resume_and_evaluate():
    digits = datasets.load("digits", None, 8)
    own = datasets.Data(Own(digits.train), Own(digits.labelled), Own(digits.test), digits.classes)
    named = train(replace(SMALL, out=Path("named")))
    whole = train(replace(SMALL, data="folder", out=Path("whole")), own)
    assert_same(named, whole)
    method, saved = load_method(Path("whole"), "cpu")
    assert saved.data == "given"
    assert evaluate(method, saved, data=own) == evaluate(method, replace(saved, data="digits"))
    assert baselines(saved, data=own)["raw pixels"]["knn"] > 0.9
    with pytest.raises(ValueError, match=r"the data were passed to train\(data=...\): pass them, or --data"):
        evaluate(method, saved)
    train(replace(SMALL, epochs=3, reschedule=True, resume=True, out=Path("whole")), own)


def test_what_a_function_returns_can_be_passed_on_resuming(mine, capsys):
    config = replace(SMALL, data=mine, workers=0, eval_every=0)
    train(config)
    data = datasets.load(mine, None, 8)
    train(replace(config, epochs=3, reschedule=True, resume=True), data)
    assert f"data was {Path('mine.py').absolute()}:make, is given" in capsys.readouterr().err
    train(replace(config, epochs=4, reschedule=True, resume=True))
    assert "data was given, is " in capsys.readouterr().err


def test_images_that_were_added_are_noticed_on_resuming():
    """Where the steps of an epoch remain as many, the rest of the epoch would be other images."""
    digits = datasets.load("digits", None, 8)
    config = replace(SMALL, eval_every=0, workers=0)
    train(config, datasets.Data(datasets.Subset(digits.train, range(1300)), None, None, []))
    more = datasets.Data(datasets.Subset(digits.train, range(1301)), None, None, [])
    with pytest.raises(ValueError, match="has 1300 images an epoch, these data make 1301: they differ"):
        train(replace(config, epochs=3, reschedule=True, resume=True), more)
    with pytest.raises(ValueError, match=r"of data that were passed to train\(config, data\): pass them"):
        train(replace(config, epochs=3, reschedule=True, resume=True))


def test_workers_read_the_callers_own_class():
    """Where its attribute asks for them; then crops stay those of the device."""

    def colour():
        """The number of this process."""
        return torch.tensor([*os.getpid().to_bytes(3, "big")], dtype=torch.uint8).view(3, 1, 1)

    class Slow(Own):
        needs_workers = True

        def __getitem__(self, indices):
            return colour().expand(len(indices), 3, 4, 4), torch.zeros(len(indices), dtype=torch.int64)

    data = datasets.python.checked(datasets.Data(Slow(range(8)), None, None, []), "data")
    assert data.train.needs_workers and datasets.Subset(data.train, [0]).needs_workers
    assert datasets.ConcatImages(data.train, data.train).needs_workers
    for crops in None, [datasets.Crop(2, (0.2, 1.0))]:
        images = torch.cat([b.images for b in load_batches(data.train, [[0, 1], [2, 3]], 1, crops=crops)])
        assert images.shape == (4, 3, 4, 4) and not (images == colour()).all(1).any()


def picture(kind):
    """Returns the same image of 12 x 9 pixels as what `open` may return."""
    pixels = np.arange(12 * 9 * 3, dtype=np.uint8).reshape(9, 12, 3)
    image = Image.fromarray(pixels)
    image.save("image.png")
    forms = {
        "path": lambda: "image.png", "bytes": lambda: Path("image.png").read_bytes(),
        "file": lambda: io.BytesIO(Path("image.png").read_bytes()), "PIL": lambda: image,
        "array": lambda: pixels,
    }  # fmt: skip
    return forms[kind]()


@pytest.mark.parametrize("kind", ["path", "bytes", "file", "PIL", "array"])
def test_items_give_what_files_do(kind):
    picture("path")
    items = datasets.Items([kind], [1], 6, picture)
    x, y = items[[0]]
    assert torch.equal(x[0], read_square("image.png", 7, 6)) and y.tolist() == [1]
    crops = [datasets.Crop(4, (0.2, 0.5)), datasets.Crop(3, (0.2, 0.5))]
    (one, other), _ = items.crop([0], crops, ["key"])
    files = datasets.images.Files([("image.png", 1)], None, datasets.decode.read_crops)
    for ours, theirs in zip((one, other), files.crop([0], crops, ["key"])[0], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(pickle.loads(pickle.dumps(items))[[0]][0], x)
    with pytest.raises(ValueError, match="there are 1 sources, but 2 labels"):
        datasets.Items([kind], [1, 2], 6, picture)


def test_a_callers_jpeg_keeps_its_size():
    """A decoder that reduces an image while it reads would change it for the next epoch."""
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save("large.jpg")
    image = Image.open("large.jpg")
    items = datasets.Items([0], None, 6, lambda _: image)
    items.crop([0], [datasets.Crop(4, (1.0, 1.0), (1.0, 1.0))], ["key"])
    assert image.size == (96, 96) and items[[0]][1].tolist() == [-1]


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (np.zeros((4, 4, 3)), r"an array must be uint8 .*, got float64 \[4, 4, 3\]"),
        (np.zeros((3, 4, 4), np.uint8), r"got uint8 \[3, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8 \[0, 4, 3\]"),
        (torch.zeros(4, 4, 3), "an image must be a path, .* or an array, got Tensor"),
        ({"bytes": b""}, "got dict"),
        (None, "got NoneType"),
    ],
)
def test_what_open_must_return_is_said(image, got):
    with pytest.raises(ValueError, match=f"cannot read 7: .*{got}"):
        datasets.Items([7], None, 4, lambda _: image)[[0]]


def test_unreadable_items_are_named_and_skipped():
    Path("bad.png").write_text("text")
    picture("path")
    items = datasets.Items(["image.png", "bad.png"], None, 6, str)
    with pytest.raises(ValueError, match=r"cannot read bad\.png: "):
        items[[1]]
    skipped = []
    (batch,) = Loader(items, 0, skipped).load([[0, 1]])
    assert skipped == ["bad.png"] and batch.indices.tolist() == [0]


BAD = {
    "none.py:make": (None, "no file .*none.py"),
    "mine.py": (MODULE, r"data 'mine.py' needs the name of a function: mine.py:make"),
    "mine.py:nothing": (MODULE, "mine.py has no function 'nothing', which returns the data"),
    "mine.py:DIGITS": (MODULE, "mine.py has no function 'DIGITS'"),
    "no_such_module:make": (None, "no module 'no_such_module'"),
    "mine": (None, "data must be digits, .*, arrays or FILE.py:FUNCTION; got 'mine'"),
    "mine.py:make": (
        "def make(size): return 3",
        r"data of .*mine\.py:make must be a relssl\.datasets\.Data, got int",
    ),
}
HEAD = "import torch\nfrom relssl.datasets import Arrays, Data\n"


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_lines(name):
    module, message = BAD[name]
    if module:
        Path("mine.py").write_text(module)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        train(replace(SMALL, data=name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (
            "torch.zeros(2, 3, 4, 4)",
            "torch.zeros(2).long()",
            2,
            r"train\[\[0\]\] must be .*, got images torch.f",
        ),
        (
            "torch.zeros(2, 4, 4, 3).byte()",
            "torch.zeros(2).long()",
            2,
            r"got images torch.uint8 \[1, 4, 4, 3\]",
        ),
        ("torch.zeros(2, 3, 4, 4).byte()", "torch.zeros(2)", 2, "got labels torch.float32"),
        ("torch.zeros(2, 3, 4, 4).byte()", "torch.full((2,), 2)", 2, "labels must be from 0 to 1, .*, got 2"),
        ("torch.zeros(0, 3, 4, 4).byte()", "torch.zeros(0).long()", 2, "train has no images"),
    ],
)
def test_bad_images_are_lines(images, labels, classes, message):
    body = f"    x = Arrays({images}, {labels})\n    return Data(x, x, None, ['a'] * {classes})\n"
    Path("mine.py").write_text(f"{HEAD}def make(size):\n{body}")
    with pytest.raises(ValueError, match=message) as error:
        train(replace(SMALL, data="mine.py:make"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"must be images .*both tensors, got Tensor"):
        train(SMALL, datasets.Data(torch.zeros(2, 3, 4, 4), None, None, []))


def test_labels_are_checked_where_they_are_used():
    """The first at once, with the names of the classes, and all of them in evaluation."""
    x = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    images = datasets.Arrays(x, torch.arange(64) % 2)
    with pytest.raises(ValueError, match="data: classes must name the labels of labelled, got none"):
        train(SMALL, datasets.Data(images, images, None, []))
    for label in -1, 2:
        images.labels[7] = label
        data = datasets.Data(images, images, images, ["a", "b"])
        config = replace(SMALL, batch_size=32, queue_size=32, epochs=1, eval_every=0, out=Path(f"of{label}"))
        method = train(config, data)
        with pytest.raises(ValueError, match=f"labels of labelled and test .* from 0 to 1, got {label}"):
            evaluate(method, config, data=data)


def test_what_is_passed_must_be_data():
    images = datasets.Arrays(torch.zeros(8, 3, 8, 8).byte(), torch.zeros(8).long())
    with pytest.raises(ValueError, match=r"^data must be a relssl\.datasets\.Data, got list"):
        train(SMALL, [])
    with pytest.raises(ValueError, match=r"^data: classes must be a list of names, got 2"):
        train(SMALL, datasets.Data(images, None, None, 2))


def test_sets_of_one_pass_have_images_of_one_shape():
    sets = (datasets.Arrays(torch.zeros(8, 3, n, n).byte(), torch.zeros(8).long()) for n in (8, 9))
    with pytest.raises(ValueError, match=r"images of one batch have shapes \[3, 8, 8\], \[3, 9, 9\]"):
        datasets.ConcatImages(*sets)[[0, 9]]


def test_modules_have_names_of_their_own():
    Path("json.py").write_text(MODULE)
    with pytest.raises(ValueError, match=r"a module 'json' is imported already: rename .*json\.py"):
        train(replace(SMALL, data="json.py:make"))
    Path("mine.py").write_text("raise ValueError('of its own')")
    for _ in range(2):
        with pytest.raises(ValueError, match="of its own"):
            train(replace(SMALL, data="mine.py:make"))


def test_numbers_of_images_and_labels_are_those_of_indices():
    x = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="there are 64 images, but 2 labels"):
        datasets.Arrays(x, torch.zeros(2).long())

    class One(Own):
        def __getitem__(self, indices):
            return self.images[indices[:1]], torch.zeros(len(indices), dtype=torch.int64)

    with pytest.raises(ValueError, match="returned 1 images or labels for 64 indices"):
        train(replace(SMALL, batch_size=32, queue_size=32), datasets.Data(One(x), None, None, []))


def test_first_image_that_cannot_be_read_is_skipped():
    """Or an error where it is used."""
    picture("path")
    Path("bad.png").write_text("text")
    items = datasets.Items(["bad.png", *["image.png"] * 8], None, 8, str)
    config = replace(SMALL, batch_size=4, queue_size=8, epochs=1, eval_every=0, workers=0)
    with pytest.raises(ValueError, match=r"cannot read bad\.png: "):
        train(config, datasets.Data(items, None, None, []))
    train(replace(config, skip_unreadable=True), datasets.Data(items, None, None, []))


def test_command(mine):
    """The options and errors of the commands, in one process each."""
    run = [sys.executable, "-m", "relssl"]
    small = "train ressl --image-size 8 --batch-size 256 --epochs 1 --arch conv4 --bn-splits 1 --out out"
    found = subprocess.run([*run, *small.split(), "--data", mine], capture_output=True, text=True)
    assert found.returncode == 0 and '"knn"' in found.stdout, found.stderr
    found = subprocess.run(
        [*run, "evaluate", "out", "--data", "mine.py:none"], capture_output=True, text=True
    )
    assert found.returncode == 1 and "mine.py has no function 'none'" in found.stderr
    assert len(found.stderr.splitlines()) == 1
