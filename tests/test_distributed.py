"""Training over two processes: gradients of the whole batch, and the command under torchrun."""

import json
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from parallel_worker import CASES, both, steps

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(both, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_the_gradients_of_one(ranks, case):
    """In float64, over two steps: the second sees parameters and a queue that the first has moved."""
    alone = steps(case)
    assert sum(name.startswith("1 ") for name in alone) == (8 if case == "ressl" else 12)
    for together in (rank[case] for rank in ranks):
        assert together.keys() == alone.keys()
        for name, expected in alone.items():
            assert expected.norm() > 0, name
            assert (together[name] - expected).norm() < 1e-10 * expected.norm(), name


def test_torchrun(tmp_path):
    """The README's line on two processes: one record, one checkpoint, and no going on with one process."""
    settings = "train sacc --data digits --queue-size 64 --epochs 1 --judge-every 0 --out run"
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m relssl"
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 200}
    run = subprocess.run([sys.executable, "-m", *f"{launcher} {settings}".split()], **how)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 1 and json.loads(run.stdout)["trained encoder"]["knn"] > 0.8
    assert len(json.loads((tmp_path / "run/metrics.json").read_text())["epochs"]) == 1
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    first, second = (r["cpu"] for r in state["randomness"])
    assert not torch.equal(first, second)  # the processes augment differently
    alone = subprocess.run([sys.executable, "-m", "relssl", *settings.split(), "--resume"], **how)
    assert alone.returncode == 1 and "is of 2 processes on cpu, this run of 1 on cpu" in alone.stderr
