"""bench/reproduce.py: a run in pieces ends as in one, and its table has the measured scores."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import reproduce
import torch
from test_training import after, assert_same

from relssl.checkpoint import load_method, read
from relssl.evaluate import evaluate
from relssl.methods.ressl import ReSSL

# 5 steps an epoch.
TINY = ("--data", "digits", "--hidden", 64, "--dim", 32, "--queue-size", 300, "--batch-size", 256)
TINY += ("--epochs", 4, "--eval-every", 0)
PIECE = 0.05  # Minutes: a few seconds.


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the script in this process; returns its status or last line, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--method", "ressl", *map(str, arguments)])
        status = 0
        try:
            reproduce.main()
        except SystemExit as stop:
            status = stop.code
        return status, "".join(capsys.readouterr())

    return run


def weights(folder):
    return load_method(folder / "ressl" / "checkpoint.pt", "cpu")[0].state_dict()


def result(folder):
    return json.loads((folder / "ressl" / "result.json").read_text())


def wait_for_the_end_of_the_piece():
    while signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL:
        time.sleep(0.02)


@pytest.mark.alone  # The first piece must reach its seventh step.
def test_pieces_end_as_one_run(command, tmp_path, monkeypatch):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    status, printed = command(*TINY, "--out", whole)
    assert status == 0
    scores = result(whole)["scores"]
    method, config = load_method(whole / "ressl" / "checkpoint.pt", "cpu")
    assert scores == evaluate(method, config)

    with monkeypatch.context() as patch:
        patch.setattr(ReSSL, "loss", after(7, wait_for_the_end_of_the_piece, ReSSL))
        options = *TINY, "--out", pieces, "--minutes", PIECE
        status, printed = command(*options, "--pieces", 1)
        assert status == 143
        assert "ressl: epoch 1.4 of 4; about 2 more pieces of 0.05 minutes" in printed
        page = (pieces / "results.md").read_text()
        assert "| ReSSL, **not the published setting** | linear accuracy | 89.97 | 1.4 of 4 epochs |" in page
        assert [p["to"] for p in result(pieces)["pieces"]] == [pytest.approx(1.4)]

    with monkeypatch.context() as patch:  # Two pieces in one process.
        patch.setattr(ReSSL, "loss", after(6, wait_for_the_end_of_the_piece, ReSSL))
        status, printed = command(*options)
    assert status == 0
    assert "ressl: epoch 2.6 of 4; about 2 more pieces" in printed
    assert "ressl: epoch 4.0 of 4\n" in printed
    assert_same(weights(pieces), weights(whole))
    assert result(pieces)["scores"] == scores

    page = (pieces / "results.md").read_text()
    assert page.strip() in printed
    for name, published in (("200-NN accuracy", 88.89), ("linear accuracy", 89.97)):
        here = 100 * scores["knn" if "NN" in name else "linear"]
        assert f"| ReSSL, **not the published setting** | {name} | {published} | {here:.2f} |" in page
    recorded = result(pieces)
    assert [(p["from"], p["to"]) for p in recorded["pieces"]] == pytest.approx(
        [(0, 1.4), (1.4, 2.6), (2.6, 4)]
    )
    assert f"- torch {torch.__version__}\n" in page
    rates = [
        e["images_per_second"] for e in json.loads((pieces / "ressl/metrics.json").read_text())["epochs"]
    ]
    assert sorted(rates)[1] <= recorded["images_per_second"] <= sorted(rates)[2]
    assert {"data": "digits", "epochs": 4, "hidden": 64}.items() <= recorded["differs"].items()

    # Neither the finished run nor its scores are computed again.
    monkeypatch.setattr(reproduce, "train", None)
    monkeypatch.setattr(reproduce, "evaluate", None)
    status, again = command(*options)
    assert status == 0 and page.strip() in again


def test_a_failing_setting_gives_the_line_of_the_command(command, tmp_path):
    line = "relssl train: batch size 4096 exceeds the 1437 training images"
    assert command(*TINY, "--batch-size", 4096)[0] == line
    assert not (tmp_path / "out/reproduce/results.md").exists()
    status, printed = command(*TINY, "--no-such-option")
    assert status == 2 and "no-such-option" in printed


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint(command, monkeypatch, number, expected):
    monkeypatch.setattr(ReSSL, "loss", after(3, lambda: os.kill(os.getpid(), number), ReSSL))
    status, printed = command(*TINY)
    assert status == expected
    assert "saved out/reproduce/ressl/checkpoint.pt" in printed
    contents = read(Path("out/reproduce/ressl/checkpoint.pt"))
    assert (contents["epoch"], contents["step"]) == (0, 3)
    assert result(Path("out/reproduce"))["pieces"][0]["to"] == pytest.approx(0.6)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)  # Nothing stops a later run.


def test_the_published_settings_are_not_marked(tmp_path):
    for name in reproduce.PUBLISHED:
        config = reproduce.train_config(name, ["--data-root", "data", "--seed", "3"])
        assert reproduce.Run(name, config).result["differs"] == {}
    assert reproduce.train_config("ressl", []).epochs == 200
    sacc = reproduce.train_config("sacc", [])
    assert (sacc.arch, sacc.epochs, sacc.image_size) == ("resnet34", 1000, 224)


def test_a_setting_of_an_earlier_piece_stays_marked(tmp_path):
    def run(*options):
        config = reproduce.train_config("ressl", list(options))
        return reproduce.Run("ressl", replace(config, out=tmp_path / "ressl"))

    (tmp_path / "ressl").mkdir()
    first = run("--lr", "0.03")
    first.result["pieces"].append({"from": 0, "to": 1, "seconds": 1})
    first.write()
    assert run().result["differs"] == run("--lr", "0.03").result["differs"] == {"lr": 0.03}
    assert "- differs: lr 0.03\n" in (tmp_path / "results.md").read_text()


def test_a_piece_without_a_step_is_an_error(command, monkeypatch):
    def stopped(config):
        os.kill(os.getpid(), signal.SIGALRM)
        sys.exit(143)

    monkeypatch.setattr(signal, "getsignal", lambda _: None)  # As if train had its handler.
    monkeypatch.setattr(signal, "raise_signal", lambda _: None)
    monkeypatch.setattr(reproduce, "train", stopped)
    assert (
        command(*TINY)[0] == "relssl train: no step was completed within 25 minutes: --minutes is too short"
    )
