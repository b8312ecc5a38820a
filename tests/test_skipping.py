"""--skip-unreadable: what replaces a file that cannot be read, and how it is reported."""

import json
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from relssl import datasets, distributed
from relssl.datasets import loading
from relssl.datasets.loading import load_batches
from relssl.methods import PRESETS
from relssl.methods.sacc import SACC
from relssl.train import epoch_batches, image_loaders, train

BROKEN = ("train/dog/03.png", "train/cat/17.png", "train/dog/11.png", "train/cat/08.png", "val/dog/2.png")
CROPS = datasets.Crop(8, (0.2, 1.0)), datasets.Crop(6, (0.08, 0.5))


@pytest.fixture
def pets(tmp_path):
    """Returns 2 x 20 training and 2 x 5 test images, of which BROKEN are unreadable; "whole" lacks those."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 5)):
        for name, value in (("cat", 10), ("dog", 150)):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = (value + generator.integers(0, 100, (16, 16, 3))).astype(np.uint8)
                digits = 2 if part == "train" else 1
                Image.fromarray(pixels).save(tmp_path / f"pets/{part}/{name}/{number:0{digits}}.png")
    shutil.copytree(tmp_path / "pets", tmp_path / "whole")
    for name in BROKEN:
        (tmp_path / "whole" / name).unlink()
        path = tmp_path / "pets" / name
        path.write_bytes(path.read_bytes()[:60] if "cat" in name else b"")
    return tmp_path / "pets"


SETTINGS = "--data folder --arch conv4 --stem small --image-size 14 --epochs 1 --batch-size 20 --clusters 2"


def test_batches_shrink_or_are_filled(pets):
    data = datasets.load("folder", pets, 14).train
    good = datasets.load("folder", pets.parent / "whole", 14).train
    paths = [path for path, _ in data.samples]
    broken = [i for i, path in enumerate(paths) if str(path).removeprefix(f"{pets}/") in BROKEN]
    rows = [list(range(20)), list(range(20, 40)), broken]
    skipped = []
    found = list(load_batches(data, rows, workers=0, skipped=skipped))
    assert [len(b.images) for b in found] == [18, 18]  # The third batch is empty, and left out.
    assert torch.equal(torch.cat([b.images for b in found]), good[list(range(36))][0])
    assert [i for b in found for i in b.indices.tolist()] == [i for i in range(40) if i not in broken]
    assert skipped == [paths[i] for i in broken] * 2
    skipped.clear()
    filled = list(load_batches(data, rows, workers=0, skipped=skipped, fill=True))
    assert [len(b.images) for b in filled] == [20, 20, 4] and set(skipped) == {paths[i] for i in broken}
    readable, _ = good[list(range(36))]
    for batch, indices in zip(filled, rows, strict=True):
        for image, label, shown, i in zip(*batch, indices, strict=True):
            alone = next(load_batches(data, [[i]], workers=0, skipped=[], fill=True))
            assert torch.equal(image, alone.images[0]) and label == alone.labels[0]
            assert alone.indices.tolist() == [shown]  # The index alone determines which image is shown.
            assert (readable == image).flatten(1).all(1).any()
            assert torch.equal(image, data[[shown]][0][0]) and (shown == i) == (i not in broken)
    by_worker = list(load_batches(data, rows, workers=1, skipped=[], fill=True))
    for one, other in zip(filled, by_worker, strict=True):
        assert all(torch.equal(t, u) for t, u in zip(one, other, strict=True))
    with pytest.raises(ValueError, match="cannot read"):
        list(load_batches(data, rows, workers=0))


def test_processes_share_the_batches_of_one(pets, monkeypatch):
    config = replace(PRESETS["sacc"]["folder"], batch_size=10, workers=0)
    passes = {"joint": datasets.load("folder", pets, 14).train}

    def batches():
        with image_loaders(passes, config, CROPS, []) as loaders:
            return [b for _, b in epoch_batches(loaders, config, 3, 1)]

    alone, shares = batches(), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(batches())
    assert len(alone) == 3 and [len(b.images[1]) for b in alone] == [10] * 3
    for whole, *parts in zip(alone, *shares, strict=True):
        for view in range(len(CROPS)):
            assert torch.equal(whole.images[view], torch.cat([b.images[view] for b in parts]))
        assert torch.equal(whole.indices, torch.cat([b.indices for b in parts]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_reports_what_it_excluded(command, pets, workers):
    """Scores are those of the data set without the files. Evaluating the run needs no option."""
    stopped = command("train", "sacc", *SETTINGS.split(), "--data-root", pets, "--out", "run")
    assert stopped.returncode == 1 and "relssl train: cannot read" in stopped.stderr
    more = "--skip-unreadable", "--workers", workers, "--out", "run"
    in_evaluation = re.escape(f"evaluation: unreadable images skipped: 5 ({pets}/train/cat/08.png, {pets}/")
    with pytest.warns(UserWarning, match=in_evaluation):
        run = command("train", "sacc", *SETTINGS.split(), "--data-root", pets, *more)
    assert run.returncode == 0, run.stderr
    line = next(
        part for part in re.split("[\r\n]", run.stderr) if part.startswith("unreadable images skipped")
    )
    assert line.startswith(f"unreadable images skipped: 4 ({pets}/train/cat/08.png, ")
    assert line.endswith(" and 1 more); others replaced them")
    assert len(run.stdout.splitlines()) == 1
    scores = json.loads(run.stdout)
    whole = command("evaluate", "run/checkpoint.pt", "--data-root", pets.parent / "whole")
    assert json.loads(whole.stdout) == scores and scores["trained encoder"]["linear"] > 0.5
    with pytest.warns(UserWarning, match=in_evaluation):
        drawn = command("evaluate", "run/checkpoint.pt", "--plots", "--projection", "pca", "--epochs", 1)
    assert drawn.returncode == 0, drawn.stderr


def test_evaluation_alone_can_skip(command, pets):
    whole = "--data-root", pets.parent / "whole"
    assert command("train", "sacc", *SETTINGS.split(), *whole, "--out", "run").returncode == 0
    here = "evaluate", "run/checkpoint.pt", "--data-root", pets, "--baselines"
    refused = command(*here)
    assert (
        refused.returncode == 1 and f"relssl evaluate: cannot read {pets}/train/cat/08.png" in refused.stderr
    )
    with pytest.warns(UserWarning, match="evaluation: unreadable images skipped: 5 "):
        found = command(*here, "--skip-unreadable")
    whole = command("evaluate", "run/checkpoint.pt", *whole, "--baselines")
    assert json.loads(found.stdout) == json.loads(whole.stdout)


def test_an_interrupted_run_goes_on_bit_for_bit(pets, tmp_path, monkeypatch):
    config = replace(
        PRESETS["sacc"]["folder"], data_root=pets, arch="conv4", image_size=14, epochs=2, batch_size=8,
        clusters=2, eval_every=0, workers=0, skip_unreadable=True, out=tmp_path / "whole run",
    )  # fmt: skip
    whole = train(config)
    config = replace(config, out=tmp_path / "parts")
    augment, calls = SACC.augment, []

    def interrupted(self, images):
        assert [len(view) for view in images] == [8] * 3
        calls.append(0)
        if len(calls) == 7:  # the second step of the second epoch
            signal.raise_signal(signal.SIGINT)
        return augment(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(SACC, "augment", interrupted)
        assert train(config).epoch < 2
    parts = train(replace(config, resume=True))
    for (name, one), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    losses = [
        [e["loss"] for e in json.loads((out / "metrics.json").read_text())["epochs"]]
        for out in (tmp_path / "whole run", tmp_path / "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_nothing_readable_is_an_error(command, pets):
    for path in pets.rglob("*.png"):
        path.write_bytes(b"")
    run = command("train", "sacc", *SETTINGS.split(), "--data-root", pets, "--skip-unreadable")
    first = pets / "train/cat/00.png"
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith(
        f"relssl train: no image can be read; unreadable images skipped: 40 ({first}, "
    )
    images = datasets.load("folder", pets, 14).train
    with pytest.raises(ValueError, match=f"{loading.MAX_DRAWS - 1} replacements are unreadable, too$"):
        next(load_batches(images, [[0, 1]], workers=0, skipped=[], fill=True))


def test_an_image_of_too_many_pixels_is_unreadable(pets, monkeypatch):
    """PIL raises a special exception for what may be a decompression bomb."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"cannot read .*00\.png: .*exceeds limit of 200 pixels"):
        datasets.load("folder", pets, 14).train[[0]]
