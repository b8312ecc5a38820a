"""A million queue rows: the loss and its gradient need no memory of the size batch x queue."""

import importlib.util
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location(
    "bench_memory", Path(__file__).parents[1] / "bench" / "memory.py"
)
memory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory)

pytestmark = pytest.mark.skipif(
    not memory.measurable(), reason="needs /proc/self/clear_refs to reset the high-water mark"
)
MIB = 2**20


def test_the_measurement_sees_a_temporary():
    # 32 MiB that are gone when the statement ends; a fresh heap page more or less besides.
    setup = "import torch; torch.ones(10)"
    used = memory.peak_extra_memory("(torch.ones(2**23) * 1).sum()", setup=setup)
    assert 64 * MIB <= used < 68 * MIB  # the ones and their product
    assert memory.peak_extra_memory("pass", setup=setup) < MIB


# One matrix of similarities would be 1 GiB, and eager code keeps several.
@pytest.mark.parametrize(("code", "allowed"), [("relssl", 16 * torch.get_num_threads()), ("chunked", 64)])
def test_relation_loss_at_a_million_rows(code, allowed):
    assert memory.relation_memory(256, 2**20, code) < allowed * MIB
