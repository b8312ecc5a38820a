"""Relational distillation: loss, frozen teacher, one view, runs that resume, and errors of one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from oracle import unit
from resuming import assert_same, train_until
from torch.nn import functional as F

from relssl import methods
from relssl.checkpoint import load_method
from relssl.evaluate import baselines, evaluate
from relssl.methods.teacher import Teacher
from relssl.train import train

HALF, QUARTER = torch.full((3,), 0.5), torch.full((3,), 0.25)
SMALL = replace(methods.PRESETS["distill"]["digits"], image_size=8, batch_size=256, epochs=2, eval_every=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of ReSSL after an epoch, with features of width 128."""
    config = replace(
        methods.PRESETS["ressl"]["digits"], image_size=8, batch_size=256, epochs=1, eval_every=0, dim=16,
        out=tmp_path_factory.mktemp("teacher"),
    )  # fmt: skip
    train(config)
    return str(config.out / "checkpoint.pt")


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("form", ["kl", "ce"])
def test_loss_is_the_relation_to_the_old_queue(form):
    config = replace(
        SMALL, dim=16, queue_size=24, form=form, student_temperature=0.2, teacher_temperature=0.01
    )
    method = config.build(HALF, QUARTER).double()
    k, q = unit(6, 16, dtype=torch.float64), unit(6, 16, dtype=torch.float64).requires_grad_()
    old = method.queue.rows.clone()
    loss, logs = method.loss((k, q))
    method.update_queue((k, q))
    rows, entropy = oracle.relation(q, k, old, 0.2, 0.01, form)
    assert abs(loss - rows.mean()) < 1e-10 and abs(logs["teacher_entropy"] - entropy.mean()) < 1e-10
    ours, theirs = (torch.autograd.grad(value, q)[0] for value in (loss, rows.mean()))
    assert (ours - theirs).norm() < 1e-10 * theirs.norm()
    assert torch.equal(method.queue.rows, torch.cat((k, old[6:])))


def test_teacher_is_frozen_and_sees_the_students_view(teacher):
    method = replace(SMALL, teacher=teacher, dim=128).build(HALF, QUARTER).train()
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    (view,) = method.augment(images)
    assert view.min() >= 0 and view.max() <= 1 and view.max() > 0.5  # normalised by neither yet
    k, q = method.encode([view])
    source, _ = load_method(Path(teacher), "cpu")
    with torch.no_grad():
        expected = F.normalize(source.backbone(source.normalize(view)), dim=1)
    torch.testing.assert_close(k, expected)
    before = [t.clone() for t in (*method.teacher.parameters(), *method.teacher.buffers())]
    loss, _ = method.loss((k, q))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    for old, new in zip(before, (*method.teacher.parameters(), *method.teacher.buffers()), strict=True):
        assert torch.equal(old, new) and new.grad is None
    assert not any("teacher" in name for name in method.state_dict())
    method.teacher.forward = method.student.forward = torch.nn.Identity()  # As torch.compile's stand there.
    method.discard_compiled()
    assert "forward" not in vars(method.teacher) and "forward" not in vars(method.student)


def test_run_resumes_in_the_middle_of_an_epoch_and_evaluates_without_its_teacher(teacher, capsys):
    config = replace(SMALL, teacher=teacher)
    whole = train(replace(config, out=config.out / "whole"))
    assert 1 < train_until(7, type(whole), config).epoch < 2  # Of 5 steps an epoch.
    resumed = train(replace(config, resume=True))
    assert_same(whole, resumed)
    Path(teacher).rename("moved")
    try:
        method, saved = load_method(config.out, "cpu")
        assert saved.dim == 128 and method.queue.rows.shape == (1024, 128)
        scores = evaluate(method, saved)
        assert scores["knn"] > 0.5 and scores["entropy_at_teacher_temperature"] > 0
        assert baselines(saved)["untrained encoder"]["knn"] > 0.1
        longer = replace(config, resume=True, epochs=3, reschedule=True)
        with pytest.raises(FileNotFoundError, match=r"no file .*checkpoint\.pt"):
            train(longer)
        assert train(replace(longer, teacher="moved")).epoch == 3
        assert f"teacher was {teacher}, is {Path('moved').absolute()}" in capsys.readouterr().err
    finally:
        Path("moved").rename(teacher)


def run(*arguments):
    command = [sys.executable, "-m", "relssl", "train", "distill", "--data", "digits", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_errors_are_lines(teacher, capsys):
    for options, error, match in [
        ({}, ValueError, "no teacher: set --teacher to a checkpoint of relssl train, or to timm/NAME"),
        ({"teacher": "nowhere.pt"}, FileNotFoundError, "no file nowhere.pt"),
        ({"teacher": teacher, "dim": 64}, ValueError, "has features of width 128, but dim is 64"),
    ]:
        with pytest.raises(error, match=match):
            train(replace(SMALL, **options))
    found = run("--teacher", "nowhere.pt")
    assert found.returncode == 1 and found.stderr == "relssl train: no file nowhere.pt\n"


def test_command_trains_and_prints_scores(teacher):
    found = run("--teacher", teacher, "--epochs", "1", "--image-size", "8", "--batch-size", "256")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["trained encoder"]["knn"] > 0.5


def test_teacher_keeps_its_own_normalization(teacher):
    source, _ = load_method(Path(teacher), "cpu")
    assert torch.equal(Teacher(teacher, 8).normalize.mean, source.normalize.mean)
