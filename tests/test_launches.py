"""Tests how many launches a loss and its gradient take (tools/launch.py counts them)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import unit

from relssl import FeatureQueue, enqueuing
from relssl.functional import info_nce, relation_loss

pytest.importorskip("triton")
import launch
from operations import Operations

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.mark.parametrize("loss", [relation_loss, info_nce])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_forward_combine_and_one_product(idle, dtype, reduction, loss):
    inputs = [unit(n, 16, dtype=dtype) for n in (8, 8, 100)]
    product = "aten::mul.Tensor" if dtype == torch.float32 else "aten::mul.out"  # rounds in the same launch
    run = launch.with_gradient(loss, *inputs, reduction=reduction)
    assert launch.launched(run) == (2, [product])


def test_without_a_gradient_no_operation_of_torch(idle):
    q, k, queue = (unit(n, 16) for n in (8, 8, 100))
    # The student's mean is a quarter of the work: it is left out, in a forward pass of its own.
    for loss, expected in (relation_loss, 3), (info_nce, 2):
        assert launch.launched(lambda loss=loss: loss(q, k, queue, backend="triton")) == (expected, [])


@pytest.mark.parametrize("ids", [False, True])
def test_enqueue_is_one_launch(idle, ids):
    """Of other strides, and of another dtype, too."""
    queue, keys = FeatureQueue(100, 16, dtype=torch.bfloat16, ids=ids), unit(16, 8).T
    launch.launches.clear()
    with Operations() as own:
        enqueuing._by_triton(
            queue.rows, queue.ids, queue.pointer, queue.count, keys, torch.arange(8) if ids else None
        )
    assert (len(launch.launches), own.names) == (1, ["aten::arange"] * ids)


DRIVEN = """
import sys; sys.path.insert(0, sys.argv[1])
from launch import launched, use_idle_driver, relation_loss, torch, with_gradient
from relssl import unit_norm

unit_norm.calls_left = 0  # The first calls also check the rows' norms.
use_idle_driver()
inputs = (torch.randn(n, 128).bfloat16() for n in (64, 64, 4096))
print(launched(with_gradient(relation_loss, *inputs)))
"""


def test_through_a_driver_that_does_nothing(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", DRIVEN, TOOLS]
    # From an empty folder, so that the source tree cannot stand in for the package.
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "(2, ['aten::mul.out'])\n", run.stderr
