"""Runs of several processes that are killed, fail or are stopped, and their checkpoints."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import restart_worker
import torch
from processes import spawn
from restart_worker import SETTINGS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from relssl.checkpoint import load_method, newest, read
from relssl.cli import train_config
from relssl.train import train

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.xdist_group("restart")]


def torchrun(folder, faults, *arguments, processes=2, restarts=0):
    """Runs the worker under torchrun in a folder, for at most four minutes.

    Returns the exit status, the lines of both outputs, and the seconds since the first one of a rank.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launch, str(processes), "--max-restarts", str(restarts), restart_worker.__file__]
    began, lines = None, []
    with subprocess.Popen(
        [sys.executable, *command, *arguments], cwd=folder, text=True, start_new_session=True,
        env=os.environ | {"FAULTS": faults, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as run:  # fmt: skip
        limit = threading.Timer(240, os.killpg, (run.pid, signal.SIGKILL))
        limit.start()
        for line in run.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("rank "):
                began = began or time.monotonic()
        status = run.wait()
        limit.cancel()
    return status, lines, time.monotonic() - began if began else None


def model(checkpoint, folder):
    """Returns the model in a checkpoint of several processes, read by torch's own tool."""
    dcp_to_torch_save(checkpoint, folder / "model.pt")
    return torch.load(folder / "model.pt")["model"]


def history(out):
    """Returns the epochs' entries in metrics.json, without the speed."""
    entries = json.loads((out / "metrics.json").read_text())["epochs"]
    return [
        {k: v for k, v in entry.items() if k not in ("images_per_second", "hours_left")} for entry in entries
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the folder of a run of two processes without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    spawn(restart_worker.undisturbed, (2, str(folder)), 2, 200)
    return folder / "whole"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Returns the folder of a run whose processes were killed twice, and what it printed."""
    folder = tmp_path_factory.mktemp("killed")
    status, lines, _ = torchrun(folder, "kills", "--out", "run", restarts=2)
    assert status == 0, "\n".join(lines)
    return folder / "run", lines


@pytest.fixture
def run(killed, tmp_path):
    """Returns a copy of that folder."""
    return shutil.copytree(killed[0], tmp_path / "run")


def test_a_killed_run_restarts_and_ends_like_one_that_was_not(whole, killed, tmp_path):
    """Killed in an epoch, and in writing a checkpoint: it resumes without --resume, bit for bit."""
    out, lines = killed
    restarts = [line for line in lines if line.startswith("restarted by torchrun")]
    assert restarts == ["restarted by torchrun: continues from run/checkpoints/epoch-0001-step-00001"] * 2
    names = [f"epoch-{epoch:04}-step-{step:05}" for epoch, step in ((1, 5), (2, 0))]
    for folder in (out, whole):
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names
        assert newest(folder) == folder / "checkpoints" / names[-1]
    expected, found = (model(newest(folder), tmp_path) for folder in (whole, out))
    assert expected.keys() == found.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert [entry["epoch"] for entry in history(out)] == [1, 2]
    for one, other in zip(history(whole), history(out), strict=True):
        assert "knn" in one and one == pytest.approx(other, rel=1e-6)
    points = EventAccumulator(str(out / "tensorboard")).Reload().Scalars("loss")
    assert [point.step for point in points] == [7, 14]


def test_another_run_into_the_folder_is_refused(run):
    """Neither the first start nor the restart continues the run that is there."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    status, lines, _ = torchrun(run.parent, "none", "--out", "run", restarts=1)
    assert status == 1
    refused = "run/checkpoints/epoch-0002-step-00000 exists: pass --resume to continue it, or another --out"
    for rank in range(2):
        assert lines.count(f"rank {rank}: relssl train: {refused}") >= 1
    assert sum(refused in line for line in lines) in (3, 4)  # torchrun may end one before it prints.
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_sigterm_to_one_of_four_processes_that_resume_two_saves_once(run):
    folders = run / "checkpoints"
    for name in ("epoch-0002-step-00001.tmp", "backup.tmp"):  # of a process that was killed, and another's
        (folders / name).mkdir()
    (folders / "notes.tmp").touch()
    status, lines, _ = torchrun(
        run.parent,
        "SIGTERM",
        *["--out", "run", "--epochs", "4", "--save-every", "0", "--resume"],
        processes=4,
    )
    assert status == 1  # torchrun's
    anew = "random numbers are drawn anew, not bit for bit as before, from epoch 3 on"
    assert lines.count(f"processes was 2, is 4; {anew}") == 1
    saved = "run/checkpoints/epoch-0003-step-00000"  # Signals are read every ten steps, and after an epoch.
    assert lines.count(f"stopped by SIGTERM and saved {saved}; --resume continues from here") == 1
    names = sorted(path.name for path in folders.iterdir())
    assert names == ["backup.tmp", "epoch-0002-step-00000", "epoch-0003-step-00000", "notes.tmp"]
    assert len(read(run)["rng_states"]) == 4 and [entry["epoch"] for entry in history(run)] == [1, 2, 3]
    ends = [int(match[1]) for line in lines if (match := re.match(r" +exitcode +: (-?\d+)", line))]
    assert ends == [143] * 4
    assert not [line for line in lines if line.startswith("rank ")]


def test_one_process_resumes_two(run, capsys):
    config = train_config("sacc", [*SETTINGS, "--out", str(run), "--epochs", "3", "--resume"])
    train(config)
    anew = "random numbers are drawn anew, not bit for bit as before, from epoch 3 on"
    assert f"processes was 2, is 1; {anew}\n" in capsys.readouterr().err
    assert newest(run) == run / "checkpoint.pt"
    assert [entry["epoch"] for entry in history(run)] == [1, 2, 3]
    with pytest.raises(FileExistsError, match=r"checkpoint\.pt exists"):
        train(replace(config, resume=False))


def test_an_error_of_one_process_ends_all(tmp_path):
    status, lines, seconds = torchrun(tmp_path, "data", "--out", "run")
    assert status == 1 and seconds < 60
    assert lines.count("rank 1: relssl train: cannot read photos/cat.png") == 1
    lost = [line for line in lines if line.startswith("rank 0: ")]
    ended = "rank 0: a collective failed, perhaps since another process has ended: "
    assert len(lost) <= 1 and all(line.startswith(ended) for line in lost)
    tracebacks = lines.count("Traceback (most recent call last):")
    assert tracebacks == 1  # torchrun's
    assert newest(tmp_path / "run") == tmp_path / "run/checkpoints/epoch-0001-step-00000"


def test_a_folder_is_evaluated_and_exported(run, command):
    folder = newest(run)
    expected = model(folder, run)
    method, config = load_method(run, "cpu")
    found = method.state_dict()
    assert config.dim == 16 and found.keys() == expected.keys()
    # One process has the rows of both shards, in the order of their ages.
    assert (found.pop("queue.num_shards"), expected.pop("queue.num_shards")) == (1, 2)
    shards = expected.pop("queue.rows").view(2, 32, 16)
    assert torch.equal(found.pop("queue.rows"), shards.flip(0).transpose(0, 1).flatten(0, 1))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    for number, name in enumerate((run, folder)):
        assert command("export", name, f"{number}.pt").returncode == 0
    first, second = (torch.load(f"{number}.pt") for number in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    scores = command("evaluate", run, "--plots", "--projection", "pca", "--epochs", 1)
    assert scores.returncode == 0 and (run / "curves.png").exists()
    empty = command("evaluate", run / "tensorboard")
    assert empty.stderr == f"relssl evaluate: no checkpoint in {run}/tensorboard"


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_damaged_folders_are_refused(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = newest(run)
    index, state, data = folder / ".metadata", folder / "state.pt", folder / "__0_0.distcp"
    contents = {path: path.read_bytes() for path in (index, state, data)}

    def message():
        with pytest.raises(ValueError) as error:
            load_method(run, "cpu")
        for path, whole in contents.items():
            path.write_bytes(whole)
        return str(error.value)

    for path in contents:
        path.write_bytes(path.read_bytes()[:1000])
        assert f"{folder} is damaged" in message()
    for path in (index, data):
        path.unlink()
        assert f"{folder} is damaged" in message()
    index.write_bytes(pickle.dumps(Code()))
    assert "mkdir is not expected" in message() and not Path("ran").exists()
    saved = torch.load(state)
    torch.save(saved | {"config": saved["config"] | {"dim": 8}}, state)
    found = message()
    assert f"{folder} does not fit: " in found and "queue.rows is [64, 16] in it, [64, 8] in" in found
    torch.save(saved | {"config": saved["config"] | {"queue_size": 0}}, state)
    assert "does not fit: Unexpected key(s): " in message()
    load_method(run, "cpu")
    (run / "checkpoints/epoch-0009-step-00000").mkdir()
    with pytest.raises(ValueError, match=r"epoch-0009-step-00000 is damaged, it has no state\.pt: remove it"):
        newest(run)
