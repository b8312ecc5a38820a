"""A million queue rows: the loss and its gradient need no memory of the size batch x queue."""

import memory
import pytest
import torch
from work import Case

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(
        not memory.measurable(), reason="needs /proc/self/clear_refs to reset the high-water mark"
    ),
]
MIB = 2**20


def test_the_measurement_sees_a_temporary():
    # 32 MiB that are gone when the statement ends; a fresh heap page more or less besides.
    setup = "import torch; torch.ones(10)"
    used = memory.peak_extra_memory("(torch.ones(2**23) * 1).sum()", setup=setup)
    assert 64 * MIB <= used < 68 * MIB  # the ones and their product
    assert memory.peak_extra_memory("pass", setup=setup) < MIB


# One matrix of similarities would be 1 GiB, and eager code keeps several.
@pytest.mark.parametrize(
    ("name", "allowed"), [("relssl", 16 * torch.get_num_threads()), ("relssl chunked", 64)]
)
def test_relation_loss_at_a_million_rows(name, allowed):
    assert memory.case_memory(Case("relation", 256, 2**20, 128), name) < allowed * MIB
