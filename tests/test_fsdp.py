"""Losses and queues beside an encoder that FSDP2 shards, and queues inside a module that is wrapped."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.xdist_group("fsdp"),  # The tests share the results of two processes.
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Returns the results of both processes; they have ended in any case."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("fsdp")
    worker = [sys.executable, str(Path(__file__).with_name("fsdp_worker.py")), str(folder)]
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*worker, str(rank), "2"], **how) for rank in range(2)]
    try:
        for process in processes:
            stderr = process.communicate(timeout=200)[1]
            assert process.returncode == 0, stderr
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_fsdp_and_ddp_train_alike_with_a_sharded_and_a_replicated_queue(ranks):
    assert set(ranks[0]["shares"]) == {0.5}  # The encoder is sharded indeed.
    expected = torch.tensor(ranks[0]["losses", True, False])
    assert len(expected) == 20 and expected[1:11].mean() > 1.2 * expected[10:].mean() > 0
    for ddp in (False, True):
        for sharded in (False, True):
            first, second = (torch.tensor(rank["losses", ddp, sharded]) for rank in ranks)
            assert torch.equal(first, second)
            assert (first - expected).abs().max() < 1e-6, (ddp, sharded)


def test_ddp_leaves_a_sharded_queue_alone(ranks):
    """DistributedDataParallel overwrites the buffers of rank 1, of which a shard is none."""
    first, second = (rank["ddp"] for rank in ranks)
    assert first["rank"] == second["rank"] == 0
    for number, found in enumerate((first, second)):
        _, ids, count = found["content"]
        assert ids.tolist() == [-1, *[100 * number, 100 * number + 1] * 2] and count == 4
    assert not (first["content"][0] == second["content"][0]).any()  # not even the start


def test_a_sharded_queue_survives_fully_shard(ranks):
    for number, rank in enumerate(ranks):
        found = rank["fsdp"]
        rows, ids, count = found["content"]
        torch.testing.assert_close(rows, rank["ddp"]["content"][0])
        assert ids.tolist() == [-1, *[100 * number, 100 * number + 1] * 2] and count == 4
        assert torch.equal(found["double"][0], rows.double()) and found["double"][0].dtype == torch.float64
        assert torch.equal(found["full"], torch.cat([other["fsdp"]["content"][0] for other in ranks]))
        assert torch.equal(found["from meta"], found["start"])
        names = {"net.bias", "net.weight", "queue.ids", "queue.rows", "queue.written"}
        assert set(found["DTensors"]) == names


@pytest.mark.parametrize(
    "load",
    [
        "load_state_dict",
        "set_model_state_dict",
        "set_model_state_dict of a full one",
        "torch.distributed.checkpoint",
    ],
)
def test_a_sharded_queue_in_a_sharded_module_is_loaded(ranks, load):
    for rank in ranks:
        for found, expected in zip(rank["fsdp"][load], rank["fsdp"]["content"], strict=True):
            assert torch.equal(found, expected)
