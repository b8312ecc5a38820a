"""Losses with gradients, and nearest neighbours, need no matrix batch x rows for a million rows."""

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


def test_the_measurement_includes_a_temporary():
    # 32 MiB that are freed at the end of the statement, with a tolerance for new heap pages.
    setup = "import torch; torch.ones(10)"
    used = memory.peak_extra_memory("(torch.ones(2**23) * 1).sum()", setup=setup)
    assert 64 * MIB <= used < 68 * MIB  # The ones and their product.
    assert memory.peak_extra_memory("pass", setup=setup) < MIB


# One matrix of similarities would be 1 GiB, and eager code keeps several.
@pytest.mark.parametrize(
    ("name", "allowed"),
    [("relssl", 16 * torch.get_num_threads()), pytest.param("relssl chunked", 64, marks=pytest.mark.slow)],
)
def test_relation_loss_at_a_million_rows(name, allowed):
    assert memory.case_memory(Case("relation", 256, 2**20, 128), name) < allowed * MIB


def test_nearest_neighbours_of_many_features():
    """A matrix of similarities would need 400 MiB, a normalized copy 25 MiB."""
    setup = """
import torch
from relssl.scores import knn_accuracy
features, labels = torch.randn(400_000, 16), torch.randint(0, 10, (400_000,))
query, y = torch.randn(256, 16), torch.randint(0, 10, (256,))
"""
    call = "knn_accuracy((features{0}, labels{0}), (query, y))"
    used = memory.peak_extra_memory(call.format(""), setup=setup, warm_up=call.format("[:1000]"))
    assert used < 32 * MIB
