"""What a run logs: agreement, effective neighbours, time left; CSV, Weights & Biases, and what is missing."""

import csv
import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from relssl.checkpoint import read
from relssl.methods import PRESETS
from relssl.methods.student import agreement
from relssl.train import train

SMALL = replace(
    PRESETS["ressl"]["digits"], image_size=8, batch_size=256, epochs=2, hidden=32, dim=16, queue_size=64,
    eval_every=2, log=(),
)  # fmt: skip


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def history(config):
    return json.loads((config.out / "metrics.json").read_text())["epochs"]


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8)])
def test_agreement_is_the_mean_cosine(shape):
    q, k = F.normalize(torch.randn(shape), dim=-1), F.normalize(torch.randn(5, 8), dim=-1)
    expected = F.cosine_similarity(q, k.expand(shape), dim=-1).mean()
    torch.testing.assert_close(agreement(q.requires_grad_(), k), expected)
    assert not agreement(q, k).requires_grad


def test_scalars_of_an_epoch():
    train(SMALL)
    first, last = history(SMALL)
    for entry in first, last:
        assert entry["effective_neighbours"] == math.exp(entry["teacher_entropy"])
        assert 1 < entry["effective_neighbours"] < 64 and -1 < entry["agreement"] < 1
    # 5 steps of 256 images are left after the first epoch, and none after the last.
    assert first["hours_left"] == pytest.approx(5 * 256 / first["images_per_second"] / 3600)
    assert last["hours_left"] == 0
    assert {path.name for path in SMALL.out.iterdir()} == {
        "checkpoint.pt", "checkpoint.previous.pt", "metrics.json",
    }  # fmt: skip


def test_csv_has_a_row_for_each_epoch_and_continues():
    config = replace(SMALL, log=("csv", "tensorboard", "csv"))
    train(config)
    train(replace(config, epochs=4, schedule="cosine", reschedule=True, resume=True, log=("csv",)))
    with (config.out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    entries = history(config)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    for row, entry in zip(rows, entries, strict=True):
        assert {name: float(value) for name, value in row.items() if value} == entry
    assert rows[0]["knn"] == "" and float(rows[1]["knn"]) > 0.3
    assert (config.out / "tensorboard").is_dir()


class Run:
    """Records what wandb.Run gets."""

    def __init__(self, settings):
        self.settings, self.logged, self.finished = settings, [], False

    def define_metric(self, *names, **options):
        pass

    def log(self, entry):
        self.logged.append(entry)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.finished = True


def test_wandb_continues_the_same_run(monkeypatch):
    runs = []

    def init(**settings):
        runs.append(Run(settings))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = replace(SMALL, log=("wandb",))
    train(config)
    train(replace(config, epochs=3, reschedule=True, resume=True))
    first, second = runs
    assert first.settings["id"] == second.settings["id"] and first.finished and second.finished
    assert first.settings["config"]["queue_size"] == 64 and first.settings["resume"] == "allow"
    assert [entry["step"] for entry in first.logged] == [5, 10, 10]  # the last ones are scores
    assert [entry["step"] for entry in second.logged] == [15, 15]
    merged = {}
    for entry in first.logged + second.logged:
        merged.setdefault(entry["step"], {}).update(entry)
    for entry, logged in zip(history(config), merged.values(), strict=True):
        assert logged.items() >= {name: v for name, v in entry.items() if name != "epoch"}.items()
    train(replace(config, out=Path("other"), epochs=1))
    assert runs[2].settings["id"] != first.settings["id"]


@pytest.mark.parametrize(("log", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named(log, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"log {log} needs another package: pip install {log}"):
        train(replace(SMALL, log=(log,)))


def test_auto_takes_apples_gpu_except_for_randaugment(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert SMALL.pick_device() == torch.device("mps")
    assert PRESETS["sacc"]["digits"].pick_device() == torch.device("cpu")
    assert PRESETS["cc"]["digits"].pick_device() == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert SMALL.pick_device() == torch.device("cpu")


def test_a_log_that_cannot_be_written_loses_no_epoch(tmp_path):
    out = tmp_path / "run"
    (out / "metrics.csv").mkdir(parents=True)
    config = replace(PRESETS["moco"]["digits"], image_size=8, epochs=1, eval_every=0, log=("csv",), out=out)
    with pytest.raises(IsADirectoryError):
        train(config)
    assert read(out)["epoch"] == 1 and len(read(out)["history"]) == 1


@pytest.mark.parametrize("names", ["csv", ("tensorbord",)])
def test_unknown_logs_are_refused(names):
    with pytest.raises(ValueError, match=f"log must be names among tensorboard, .*, got .*{names[0]}"):
        train(replace(PRESETS["moco"]["digits"], log=names))
