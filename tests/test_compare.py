"""The comparison of the methods: equal budgets, and the table of the scores."""

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import compare
import pytest
import torch
from torch import nn

from relssl.methods import PRESETS, distill


class FrozenEncoder(nn.Module):
    """Stands for the teacher of distillation."""

    def __init__(self, source, size):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 8)).requires_grad_(False)

    def forward(self, images):
        return self.backbone(images)


@pytest.mark.parametrize(("name", "passes"), [(name, found[0]) for name, found in compare.METHODS.items()])
def test_passes_of_a_step(name, passes, tmp_path, monkeypatch):
    """A forward pass of an encoder counts once, and one with a graph three times, since it has a backward."""
    monkeypatch.setattr(distill, "Teacher", FrozenEncoder)
    config = compare.config(name, 0, tmp_path, 144, ["--dim", "8"])
    assert config.epochs == 144 / passes and (config.image_size, config.stem) == (32, "small")
    if name in ("cc", "sacc"):
        config = replace(config, clusters=3)
    method = config.build(torch.zeros(3), torch.ones(3)).train()
    encoders = [method.backbone]
    if hasattr(method, "teacher"):
        encoders.append(method.teacher.backbone if name == "distill" else method.teacher["backbone"])
    counts = []
    for encoder in encoders:
        encoder.register_forward_hook(lambda _, inputs, y: counts.append(3 if y.requires_grad else 1))
    method(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))
    assert sum(counts) == passes


def test_every_method_is_compared():
    assert compare.METHODS.keys() == PRESETS.keys() and compare.TITLES.keys() == {"baselines", *PRESETS}


def test_runs_are_scored_and_tabulated(tmp_path):
    options = ["--data", "digits", "--image-size", "8"]
    record = compare.run("moco", 0, tmp_path, 4, [*options, "--hidden", "16", "--queue-size", "64"])
    assert record["settings"]["epochs"] == 1 and (tmp_path / "moco-0" / "checkpoint.pt").exists()
    untrained = compare.run("baselines", 0, tmp_path, 4, options)
    other = {**record, "scores": record["scores"] | {"knn": record["scores"]["knn"] + 0.02}}
    rows = compare.rows({"baselines": [untrained, untrained], "moco": [record, other]})
    assert [(row[""], row["epochs"]) for row in rows] == [
        ("raw pixels", "-"), ("untrained encoder", "-"), ("MoCo", "1"),
    ]  # fmt: skip
    assert rows[0]["200-NN, %"] == "95.0 ± 0.0"
    assert rows[2]["200-NN, %"] == f"{100 * record['scores']['knn'] + 1:.1f} ± 1.4"


def test_each_run_is_a_process_after_that_of_its_teacher(tmp_path, monkeypatch, capsys):
    """Even with a job for each run; those that are recorded are not computed again."""
    events = []

    def process(command, **options):
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        name, seed = command[3:5]
        events.append(("begun", name, seed))
        time.sleep(0.2 if name == "ressl" else 0)
        events.append(("ended", name, seed))
        scores = dict.fromkeys(compare.SCORES, 0.5)
        record = {"scores": {"raw": scores} if name == "baselines" else scores, "settings": {"epochs": 1}}
        record["commit"] = f"{seed}f"
        return SimpleNamespace(stdout=f"a line before it\n{json.dumps(record)}\n")

    monkeypatch.setattr(compare.subprocess, "run", process)
    monkeypatch.setattr(compare.machine, "about", lambda _: {"device": "CPU", "torch": "2"})
    monkeypatch.setattr(
        compare.tables, "write", lambda path, rows, **about: events.append((path, rows, about))
    )
    monkeypatch.setattr(sys, "argv", f"compare.py --out {tmp_path} --seeds 2 --jobs 16".split())
    compare.main()
    for seed in "01":
        assert events.index(("ended", "ressl", seed)) < events.index(("begun", "distill", seed))
    path, rows, about = events.pop()
    assert about == {"seeds": "2", "commit": "0f, 1f", "device": "CPU", "torch": "2"}
    assert path == tmp_path / "methods.json" and len(rows) == 1 + len(PRESETS)
    assert len(events) == 2 * 2 * (1 + len(PRESETS))
    events.clear()
    compare.main()
    assert events == [(path, rows, about)]
    assert capsys.readouterr().out.count("| ReSSL | 1 | 50.0 ± 0.0 |") == 2
    sys.argv += ["--budget", "12"]
    with pytest.raises(SystemExit):
        compare.main()
    assert "has runs of 144, not 12: another --out" in capsys.readouterr().err
