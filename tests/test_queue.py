"""Tests FeatureQueue against Python's deque, without synchronisation, and on several ranks."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from gather_worker import gather
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import Operations
from oracle import unit
from processes import spawn
from torch._dynamo.testing import CompileCounter

from relssl import FeatureQueue, enqueuing
from relssl.backends import cpu
from relssl.functional import relation_loss

FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "sliced": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "every other": lambda t: t.repeat_interleave(2, 0)[::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


class Ring:
    """The oracle: the rows and their ids, the oldest first, and the number of rows seen."""

    def __init__(self, queue):
        self.size, self.seen = len(queue), 0
        self.entries = deque(((tuple(row), -1) for row in queue.rows.tolist()), maxlen=self.size)

    def enqueue(self, keys, ids):
        self.entries.extend((tuple(row), int(id)) for row, id in zip(keys.tolist(), ids, strict=True))
        self.seen += len(keys)

    def check(self, queue):
        assert int(queue.pointer) == self.seen % self.size
        assert int(queue.count) == min(self.seen, self.size)
        oldest_first = queue.rows.roll(-int(queue.pointer), 0)  # The pointer is at the oldest row.
        assert list(map(tuple, oldest_first.tolist())) == [row for row, _ in self.entries]
        if queue.ids is not None:
            assert queue.ids.roll(-int(queue.pointer)).tolist() == [id for _, id in self.entries]


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


@pytest.mark.parametrize("way", ["cpu", "torch"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_first_in_first_out(way, data):
    """Also where it is saved and goes on as another queue, and every buffer's version moves."""
    draw = data.draw
    size, dim, dtype = draw(st.integers(1, 12)), draw(st.integers(1, 9)), draw(st.sampled_from(FLOATS))
    options = {"dtype": dtype, "ids": draw(st.booleans())}
    queue = FeatureQueue(size, dim, **options)
    ring = Ring(queue)
    for batch in draw(st.lists(st.integers(1, 30), max_size=8)):  # up to more than twice the queue
        keys = torch.randn(batch, dim, dtype=torch.float64).to(draw(st.sampled_from(FLOATS)))
        keys = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](keys)
        ids = torch.randint(-2, 9, (2 * batch,))[::2]
        if draw(st.booleans()):
            saved, queue = queue.state_dict(), FeatureQueue(size, dim, **options, start="zeros")
            queue.load_state_dict(saved)
        versions = [t._version for t in queue.buffers()]
        with mock.patch.object(cpu, "_cpu", cpu._cpu if way == "cpu" else None):
            queue.enqueue(keys, ids if options["ids"] else None)
        assert all(t._version > old for t, old in zip(queue.buffers(), versions, strict=True))
        ring.enqueue(keys.to(dtype), ids)
        ring.check(queue)


def test_the_ways_to_enqueue():
    """A buffer of another layout or dtype, which load_state_dict can assign, has no address to write to."""
    queue = FeatureQueue(5, 8, ids=True)
    state = {name: t.clone() for name, t in queue.state_dict().items()}
    assert enqueuing._way(queue.rows, queue.ids, queue.pointer, queue.count) is enqueuing._by_cpu
    for name, other in (
        ("rows", torch.empty(8, 5).T.copy_(state["rows"])),
        ("ids", torch.full((10,), -1)[::2]),
        ("pointer", state["pointer"].int()),
        ("count", state["count"].int()),
    ):
        unshared = {key: t.clone() for key, t in state.items()}
        queue.load_state_dict(unshared | {name: other}, assign=True)
        assert enqueuing._way(queue.rows, queue.ids, queue.pointer, queue.count) is enqueuing._by_torch
        ring = Ring(queue)
        keys = unit(3, 8)
        queue.enqueue(keys, torch.arange(3))
        ring.enqueue(keys, range(3))
        ring.check(queue)


@pytest.mark.parametrize("pointer", [-2, 12])
def test_a_pointer_out_of_range_writes_within_the_queue(pointer):
    queue = FeatureQueue(5, 8)
    queue.pointer.fill_(pointer)
    before, keys = queue.rows.clone(), unit(2, 8)
    queue.enqueue(keys)
    first = pointer % 5
    before[first : first + 2] = keys
    assert torch.equal(queue.rows, before)
    assert int(queue.pointer) == first + 2 - 5 * (first == 3)


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


@pytest.mark.parametrize("start", ["zeros", "empty"])
def test_start_with_zeros(start):
    queue = FeatureQueue(5, 8, start=start, ids=True)
    assert queue.rows.shape == (5, 8) and not queue.rows.any()
    assert queue.ids.tolist() == [-1] * 5
    queue.enqueue(unit(3, 8), torch.arange(3))
    assert queue.filled is (queue.count if start == "empty" else None)
    assert int(queue.count) == 3
    queue.reset()
    assert not queue.rows.any() and queue.ids.tolist() == [-1] * 5 and int(queue.count) == 0
    assert FeatureQueue(5, 8).filled is None


def test_state_dict_with_ids():
    queue, plain = FeatureQueue(5, 8, ids=True), FeatureQueue(5, 8)
    assert set(queue.state_dict()) == {"rows", "pointer", "count", "ids"} and plain.ids is None
    plain.load_state_dict(FeatureQueue(5, 8).state_dict())  # as before there were ids
    with pytest.raises(RuntimeError, match=r'Missing key.*"ids"'):
        queue.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"ids"'):
        plain.load_state_dict(queue.state_dict())


def test_no_host_synchronisation():
    queue = FeatureQueue(5, 8, ids=True)
    keys, ids = unit(7, 8), torch.arange(7)
    with Operations() as own:
        queue.enqueue(keys[:3], ids[:3])
        enqueuing._by_torch(queue.rows, queue.ids, queue.pointer, queue.count, keys, ids)
    assert own.names.count("relssl::enqueue") == 1 and own.names.count("aten::index_copy_") == 2
    assert not own.synchronisations


def test_compiles_once():
    queue, plain = FeatureQueue(10, 8, ids=True), FeatureQueue(10, 8, ids=True)
    counter = CompileCounter()
    enqueue = torch.compile(queue.enqueue, backend=counter, fullgraph=True)
    for _ in range(4):  # wraps around in the third
        keys, ids = unit(4, 8), torch.randint(9, (4,))
        enqueue(keys, ids)
        plain.enqueue(keys, ids)
    assert counter.frame_count == 1
    for name, value in plain.state_dict().items():
        assert torch.equal(queue.state_dict()[name], value), name


@pytest.mark.parametrize(
    "way", ["cpu", "torch", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_every_way_to_enqueue_is_noticed_by_double_backward(way, monkeypatch):
    queue, q = FeatureQueue(16, 8, ids=True), unit(4, 8).requires_grad_()
    loss = relation_loss(q, unit(4, 8), queue)
    if way == "torch":
        monkeypatch.setattr(cpu, "_cpu", None)
    run = queue.enqueue
    if way in ("aot_eager", "inductor"):
        run = torch.compile(run, fullgraph=True, backend=way)
    versions = [t._version for t in queue.buffers()]
    run(unit(3, 8), torch.arange(3))
    assert all(t._version > old for t, old in zip(queue.buffers(), versions, strict=True))
    with pytest.raises(RuntimeError, match="queue has changed since the forward pass"):
        torch.autograd.grad(loss, q, create_graph=True)


@pytest.mark.alone
def test_threads_enqueue_one_after_the_other():
    queue, batch, threads, times = FeatureQueue(200_000, 256, ids=True, start="zeros"), 12_000, 4, 4

    def run(id):
        keys, ids = torch.full((batch, 256), float(id)), torch.full((batch,), id)
        for _ in range(times):
            queue.enqueue(keys, ids)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(1, threads + 1)))
    assert [int((queue.ids == id).sum()) for id in range(1, threads + 1)] == [batch * times] * threads
    assert torch.equal(queue.rows[: int(queue.count), 0].long(), queue.ids[: int(queue.count)])


@pytest.mark.alone
def test_gather_over_processes(tmp_path):
    spawn(gather, (2, str(tmp_path)), 2, 100)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    start = FeatureQueue(7, 3).rows
    for rank in ranks:
        assert torch.equal(rank["start"], start)  # drawn in another process
        # Two enqueues of 2 rows on 2 ranks, each row marked (rank, step, row); the eighth row
        # overwrites the first.
        expected = [(r, s, i) for s in range(2) for r in range(2) for i in range(2)]
        expected = torch.tensor([expected[7], *expected[1:7]]).float()
        assert torch.equal(rank["rows"], expected)
        assert torch.equal(rank["ids"], (expected @ torch.tensor([100.0, 10.0, 1.0])).long())
        assert not rank["requires_grad"]
        assert (rank["pointer"], rank["count"]) == (1, 7)
