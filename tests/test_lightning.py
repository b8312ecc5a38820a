"""The example of Lightning: a resumed run is bit-equal, and two processes share a queue."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "lightning_module.py"
# torchvision's CUDA build is broken beside a CPU-only torch; importing it so mends that, for every process.
MEND = "import relssl.datasets.torchvision_import"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed"),
]


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(MEND)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


def run(*options):
    command = [sys.executable, str(EXAMPLE), *options]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert found.returncode == 0, found.stderr
    return torch.load(f"{options[-1]}/last.ckpt", weights_only=False)


def test_a_resumed_run_is_bit_equal():
    whole = run("--epochs", "3", "--out", "whole")
    run("--epochs", "1", "--out", "part")
    resumed = run("--epochs", "3", "--resume", "part/last.ckpt", "--out", "part")
    assert whole["global_step"] == resumed["global_step"] == 42
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name


def test_two_processes_share_a_queue():
    state = run("--epochs", "1", "--devices", "2", "--out", "both")["state_dict"]
    # 14 steps of 128 keys, 64 of each process.
    assert int(state["queue.count"]) == 1024 and int(state["queue.pointer"]) == 14 * 128 % 1024
    norms = state["queue.rows"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(1024))
