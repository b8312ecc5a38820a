"""Tests FeatureQueue against a Python list, without synchronisation, and on several ranks."""

from collections import deque

import pytest
import torch
import torch.multiprocessing as mp
from gather_worker import gather
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import unit
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from relssl import FeatureQueue


def test_random_unit_norm_start():
    queue = FeatureQueue(1000, 16)
    assert len(queue) == 1000
    assert (int(queue.pointer), int(queue.count)) == (0, 0)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(1000))
    # Directions spread evenly: each coordinate has mean 0 and variance 1/16, here to 5 deviations.
    assert queue.rows.mean(0).abs().max() < 5 * (1 / 16 / 1000) ** 0.5
    assert len(queue.rows.unique(dim=0)) == 1000


def test_start_depends_on_the_seed_alone():
    first = FeatureQueue(50, 8, seed=3).rows
    torch.manual_seed(12345)
    assert torch.equal(FeatureQueue(50, 8, seed=3).rows, first)
    assert not torch.isclose(FeatureQueue(50, 8, seed=4).rows, first).all(1).any()


def test_start_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    FeatureQueue(50, 8).reset()
    assert torch.equal(torch.get_rng_state(), state)


def test_start_is_not_the_callers_first_noise():
    torch.manual_seed(0)
    noise = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)
    assert not torch.isclose(FeatureQueue(50, 8, seed=0).rows, noise).all(1).any()


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 12),
    batches=st.lists(st.integers(1, 30), max_size=8),  # up to more than twice the queue
)
def test_first_in_first_out(size, batches):
    queue = FeatureQueue(size, 2)
    model = deque(map(tuple, queue.rows.tolist()), maxlen=size)
    seen = 0
    for batch in batches:
        keys = torch.arange(seen, seen + batch).float()[:, None].expand(-1, 2)
        queue.enqueue(keys)
        model.extend(map(tuple, keys.tolist()))
        seen += batch
        assert int(queue.pointer) == seen % size
        assert int(queue.count) == min(seen, size)
        # The pointer is at the oldest row.
        oldest_first = queue.rows.roll(-int(queue.pointer), 0)
        assert list(map(tuple, oldest_first.tolist())) == list(model)


def test_enqueue_copies():
    queue, keys = FeatureQueue(4, 8), unit(2, 8)
    before = keys.clone()
    queue.enqueue(keys)
    keys.zero_()
    assert torch.equal(queue.rows[:2], before)


def test_enqueue_takes_no_gradient():
    queue, keys = FeatureQueue(4, 8), unit(2, 8).requires_grad_()
    queue.enqueue(keys * 2)
    assert not queue.rows.requires_grad
    assert torch.equal(queue.rows[:2], keys.detach() * 2)


def test_enqueue_any_strides():
    queue, keys = FeatureQueue(4, 8), unit(8, 3)
    queue.enqueue(keys.T)
    assert torch.equal(queue.rows[:3], keys.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_own_dtype(dtype):
    queue, keys = FeatureQueue(4, 8, dtype=dtype), unit(2, 8)
    queue.enqueue(keys)
    assert queue.rows.dtype == dtype
    assert torch.equal(queue.rows[:2], keys.to(dtype))


def test_state_dict_round_trip(tmp_path):
    queue = FeatureQueue(5, 8, dtype=torch.bfloat16)
    queue.enqueue(unit(7, 8))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other = FeatureQueue(5, 8, dtype=torch.bfloat16, seed=1)
    other.load_state_dict(torch.load(tmp_path / "queue.pt"))
    keys = unit(2, 8)
    for ring in (queue, other):
        ring.enqueue(keys)
    for name, value in queue.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert set(queue.state_dict()) == {"rows", "pointer", "count"}


def test_reset():
    queue = FeatureQueue(5, 8, seed=2)
    queue.enqueue(unit(3, 8))
    queue.reset()
    assert torch.equal(queue.rows, FeatureQueue(5, 8, seed=2).rows)
    assert (int(queue.pointer), int(queue.count)) == (0, 0)


def test_no_host_synchronisation():
    # On an accelerator any of these would wait for the device; on the CPU they are only detected.
    class Watch(TorchDispatchMode):
        calls = ()

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.calls += (op.overloadpacket.__name__,)
            return op(*args, **(kwargs or {}))

    queue = FeatureQueue(5, 8)
    with Watch() as watch:
        queue.enqueue(unit(3, 8))
        queue.enqueue(unit(7, 8))
    assert "index_copy_" in watch.calls
    assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"} & set(watch.calls)


def test_compiles_once():
    queue, plain = FeatureQueue(10, 8), FeatureQueue(10, 8)
    counter = CompileCounter()
    enqueue = torch.compile(queue.enqueue, backend=counter, fullgraph=True)
    for _ in range(4):  # wraps around in the third
        keys = unit(4, 8)
        enqueue(keys)
        plain.enqueue(keys)
    assert counter.frame_count == 1
    for name, value in plain.state_dict().items():
        assert torch.equal(queue.state_dict()[name], value), name


@pytest.mark.alone
def test_gather_over_processes(tmp_path):
    mp.spawn(gather, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    start = FeatureQueue(7, 3).rows
    for rank in ranks:
        assert torch.equal(rank["start"], start)  # drawn in another process
        # Two enqueues of 2 rows on 2 ranks, each row marked (rank, step, row); the eighth row
        # overwrites the first.
        expected = [(r, s, i) for s in range(2) for r in range(2) for i in range(2)]
        expected = torch.tensor([expected[7], *expected[1:7]]).float()
        assert torch.equal(rank["rows"], expected)
        assert not rank["requires_grad"]
        assert (rank["pointer"], rank["count"]) == (1, 7)
