"""Times enqueueing a batch of keys, by relssl's queue and others."""

import pytest
import torch
from machine import DEVICE, matrix_product
from peers import QUEUES, Unsupported
from timing import alternate
from torch.nn import functional as F
from work import Case


@pytest.mark.parametrize("name", QUEUES)
def test_enqueue(name, benchmark, results):
    case = Case("enqueue", 256, 65_536, 128)
    start = F.normalize(torch.randn(case.size, case.dim, device=DEVICE), dim=1)
    keys = F.normalize(torch.randn(2, case.rows, case.dim, device=DEVICE), dim=2)
    try:
        queue, ours = QUEUES[name](start), QUEUES["relssl"](start)
    except Unsupported as why:
        results.absent(case, name, str(why))
        pytest.skip(str(why))
    for batch in keys:
        queue.enqueue(batch)
    assert torch.equal(queue.rows(), torch.cat((keys.flatten(0, 1), start[2 * case.rows :]))), name
    benchmark.group, benchmark.name = str(case), name
    seconds = alternate(
        benchmark,
        DEVICE,
        lambda: ours.enqueue(keys[0]),
        lambda: queue.enqueue(keys[0]),
        matrix_product(torch.bfloat16)[0],
        1.0,
    )
    benchmark.extra_info.update(results.timed(case, name, seconds, None, None))
