"""Training over two processes: gradients of the whole batch, and the command under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from parallel_worker import CASES, PARTS, RUN, both, ended, steps, terminated
from processes import spawn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from relssl import distributed
from relssl.checkpoint import newest, read

pytestmark = pytest.mark.xdist_group("distributed")  # The tests share the results of two processes.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with the results of both processes, and in one/ a run that a single process began."""
    folder = tmp_path_factory.mktemp("ranks")
    assert ended(replace(RUN, out=folder / "one"), 4, terminated) == 143
    spawn(both, (2, str(folder)), 2, 300)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def model(checkpoint, tmp_path):
    """Returns the model of a checkpoint; torch's own tool reads those of several processes."""
    if checkpoint.is_file():
        return read(checkpoint)["model"]
    dcp_to_torch_save(checkpoint, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt")["model"]


@pytest.mark.parametrize("case", CASES)
def test_parts_and_processes_compute_the_gradients_of_the_whole_batch(ranks, case):
    """Compares two steps in float64; the second depends on the first's updates of parameters and queue."""
    alone = steps(case)
    assert sum(name.startswith("1 ") for name in alone) == (12 if "sacc" in case or case == "cc" else 8)
    others = [steps(case, parts) for parts in PARTS[1:]]
    for together in (*others, *(rank[case, parts] for parts in PARTS for rank in ranks)):
        assert together.keys() == alone.keys()
        for name, expected in alone.items():
            assert expected.norm() > 0, name
            assert (together[name] - expected).norm() < 1e-10 * expected.norm(), name


def test_another_number_of_processes_on_resuming(folder, ranks, capfd, tmp_path):
    """Resumed in the middle of an epoch by two processes instead of one, or one of two, weights are equal."""
    whole, one, two = (replace(RUN, out=folder / name, resume=True) for name in ("whole", "one", "two"))
    assert ended(whole, 0, None) == "at its end"
    expected = read(whole.out)
    assert {rank["runs"]["stopped"] for rank in ranks} == {143}
    folders = two.out / "checkpoints"
    assert [path.name for path in folders.iterdir()] == ["epoch-0000-step-00010"]  # Both stopped there.
    between = read(two.out)
    assert (between["step"], len(between["rng_states"])) == (10, 2)
    assert ended(two, 0, None) == "at its end"
    anew = "random numbers are drawn anew, not bit for bit as before, from epoch 1, step 11 on"
    assert capfd.readouterr().err.count(f"processes was 2, is 1; {anew}\n") == 1
    assert {rank["runs"]["resumed"] for rank in ranks} == {"at its end"}
    assert newest(one.out) == one.out / "checkpoints/epoch-0001-step-00000"
    assert newest(two.out) == two.out / "checkpoint.pt"
    for config in (one, two):
        found = read(config.out)
        assert (found["epoch"], found["step"]) == (1, 0)
        assert found["history"][0]["loss"] == pytest.approx(expected["history"][0]["loss"], rel=1e-6)
        weights = model(newest(config.out), tmp_path)
        assert weights.keys() == expected["model"].keys()
        for name, tensor in expected["model"].items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-7, atol=1e-9)
    first, second = (r["cpu"] for r in read(one.out)["rng_states"])
    assert not torch.equal(first, second)


def test_a_bad_loss_of_one_process_stops_all(folder, ranks):
    message = (
        "the loss is not finite at epoch 1, step 3 of 14 (learning rate 0.001):"
        f" no checkpoint has been written to {folder}/bad yet"
    )
    assert [rank["runs"]["bad"] for rank in ranks] == [message] * 2
    assert newest(folder / "bad") is None
    two, four = (folder / f"often/checkpoints/epoch-0000-step-{step:05}" for step in (2, 4))
    message = (
        f"the loss is not finite at epoch 1, step 5 of 14 (learning rate 0.001): the weights in {four} cause"
        f" it; remove it, and --resume with a lower --lr continues from {two}"
    )
    assert [rank["runs"]["often"] for rank in ranks] == [message] * 2
    assert newest(folder / "often") == four and read(two)["step"] == 2


def test_restarted_processes_find_no_address_of_the_start_before(monkeypatch):
    """torchrun's store survives; ranks 1 and 2 read it before rank 0 has begun anew."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    launches = []
    for start in "0", "1":
        monkeypatch.setattr(distributed, "_launch", (None, False))
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(distributed._store_of_this_start, rank, 3) for rank in (1, 2)]
            time.sleep(0.1)
            assert not any(other.done() for other in others)
            stores = [pool.submit(distributed._store_of_this_start, 0, 3).result(20)]
            stores += [other.result(20) for other in others]
        assert not any(store.check(["address"]) for store in stores)
        stores[0].set("address", start)
        assert [store.get("address") for store in stores] == [start.encode()] * 3
        launches.append(distributed.launch())
    (first, restarted), second = launches
    assert len(first) == 32 and not restarted and second == (first, True)


ENDINGS = """
import os, sys, torch
import torch.distributed as dist
from relssl.distributed import process_group

begin = dist.init_process_group
dist.init_process_group = lambda name, timeout: begin(name, store=dist.HashStore(), rank=0, world_size=1)
os.environ["TORCHELASTIC_RUN_ID"] = "1"
sys.setswitchinterval(60)  # Gloo's threads get the GIL only from a thread that releases it.
for _ in range(100):
    with process_group(torch.device("cpu")):
        module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        module(torch.ones(2, 4)).sum().backward()
        for _ in range(20):
            dist.all_gather([torch.empty(1000)], torch.ones(1000))
    del module
print("ended")
"""


def test_a_process_ends_after_ddp():
    """DistributedDataParallel's end does not wait for a thread of Gloo that waits for the GIL."""
    run = subprocess.run([sys.executable, "-c", ENDINGS], capture_output=True, text=True, timeout=100)
    assert run.stdout == "ended\n", run.stderr


RELEASE = """
import sys
from relssl import distributed

class Group:
    def __del__(self):
        print("late" if sys.is_finalizing() else "in time")

distributed._last_group.append(Group())
"""


def test_a_group_is_released_before_the_interpreter_shuts_down():
    """Later, a thread of Gloo that asks for the GIL would abort the process."""
    run = subprocess.run([sys.executable, "-c", RELEASE], capture_output=True, text=True, timeout=100)
    assert run.stdout == "in time\n", run.stderr


@pytest.mark.slow
@pytest.mark.alone
def test_torchrun(tmp_path):
    """Runs the README's command in two processes, stops them like a cluster, and resumes them.

    The launcher forwards to its processes the signal that they have received already.
    """
    settings = "train sacc --data digits --queue-size 64 --epochs 1 --eval-every 0 --out run --resume"
    settings += " --loggers csv"
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 -m relssl"
    launcher = [sys.executable, *launch.split()]
    how = {"cwd": tmp_path, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    begun = subprocess.Popen(
        [*launcher, *settings.split(), "--save-every", "1"], **how, **pipes, start_new_session=True
    )
    end = time.monotonic() + 200
    while not newest(tmp_path / "run"):
        assert begun.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.killpg(begun.pid, signal.SIGTERM)
    stdout, stderr = begun.communicate(timeout=200)
    saved = newest(tmp_path / "run").relative_to(tmp_path)
    assert stdout == f"stopped by SIGTERM and saved {saved}; --resume continues from here\n", stderr
    state = read(tmp_path / "run")
    assert state["epoch"] == 0 and 0 < state["step"] < 14
    with pytest.raises(ProcessLookupError):
        os.killpg(begun.pid, 0)
    run = subprocess.run([*launcher, *settings.split()], **how, capture_output=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 1 and json.loads(run.stdout)["trained encoder"]["knn"] > 0.8
    assert len(json.loads((tmp_path / "run/metrics.json").read_text())["epochs"]) == 1
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == 2
    state = read(tmp_path / "run")
    first, second = (r["cpu"] for r in state["rng_states"])
    assert not torch.equal(first, second)  # The processes augment differently.
