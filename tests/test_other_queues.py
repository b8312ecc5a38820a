"""Tests FeatureQueue.load_state_dict with the buffers of other projects, which go on as theirs would."""

import pytest
import torch
from oracle import unit
from torch import nn

from relssl import FeatureQueue

K, D = 10, 4


class Columns:
    """The queue of MoCo and of ReSSL's authors, [D, K]; of solo-learn's ReSSL, [K, D], with rows=True."""

    def __init__(self, size, dim, rows):
        self.rows, self.size = rows, size
        self.state = {"queue": unit(size, dim).T.contiguous(), "queue_ptr": torch.zeros(1).long()}
        if rows:
            self.state["queue"] = self.state["queue"].T.contiguous()

    def enqueue(self, keys):
        queue, pointer = (
            (self.state["queue"].T if self.rows else self.state["queue"]),
            self.state["queue_ptr"],
        )
        queue[:, pointer[0] : pointer[0] + len(keys)] = keys.T
        pointer[0] = (pointer[0] + len(keys)) % self.size


def below(prefix, state):
    return {prefix + name: t.clone() for name, t in state.items()}


def model(**options):
    """Returns a larger module, and its queue."""
    found = nn.ModuleDict({"head": nn.Linear(2, 2), "memory": FeatureQueue(K, D, **options)})
    return found, found["memory"]


@pytest.mark.parametrize("rows", [False, True], ids=["MoCo", "solo-learn"])
@pytest.mark.parametrize(
    "options", [{}, {"ids": True}, {"start": "empty"}, {"dtype": torch.float64}], ids=str
)
@pytest.mark.parametrize("assign", [False, True])
def test_goes_on_as_the_other_queue(rows, options, assign):
    other, (module, queue) = Columns(K, D, rows), model(**options)
    other.enqueue(unit(5, D))
    state = module["head"].state_dict(prefix="head.") | below("memory.", other.state)
    given = dict(state)
    module.load_state_dict(state, assign=assign)
    assert state == given  # the caller's
    for _ in range(3):
        assert torch.equal(queue.rows.float(), other.state["queue"] if rows else other.state["queue"].T)
        assert int(queue.pointer) == int(other.state["queue_ptr"])
        keys = unit(5, D)
        other.enqueue(keys)
        queue.enqueue(keys, torch.arange(5) if queue.ids is not None else None)
    assert int(queue.count) == K and queue.pointer.dim() == 0
    if queue.ids is not None:
        assert queue.ids.tolist() == [*range(5)] * 2
        queue.load_state_dict(other.state)
        assert queue.ids.tolist() == [-1] * K
        queue.load_state_dict(other.state | {"ids": torch.arange(K)})
        assert queue.ids.tolist() == [*range(K)]
    again = FeatureQueue(K, D, **options)
    again.load_state_dict(queue.state_dict())  # its own layout


def test_as_many_rows_as_columns_are_moco_s():
    queue, columns = FeatureQueue(D, D), unit(D, D)
    queue.load_state_dict({"queue": columns, "queue_ptr": torch.tensor([3])})
    assert torch.equal(queue.rows, columns.T) and int(queue.pointer) == 3


def test_into_a_queue_on_the_meta_device():
    other, queue = Columns(K, D, False), FeatureQueue(K, D, ids=True, device="meta")
    queue.load_state_dict(other.state, assign=True)
    queue.enqueue(unit(2, D), torch.arange(2))
    assert torch.equal(queue.rows[2:], other.state["queue"].T[2:])
    assert queue.ids.tolist() == [0, 1] + [-1] * (K - 2) and (int(queue.pointer), int(queue.count)) == (2, K)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"queue": torch.ones(2, D, K)},
            r"memory.queue holds two queues, \(2, 4, 10\): load memory.queue\[0\]",
        ),
        ({"queue": torch.ones(D, K + 1)}, r"size mismatch for memory.rows: .*\[4, 11\].*\[10, 4\]"),
        ({"queue": torch.ones(K)}, r"size mismatch for memory.rows: .*\[10\].*\[10, 4\]"),
        ({"queue": torch.ones(3, D, K)}, r"size mismatch for memory.rows: .*\[3, 4, 10\]"),
        ({"queue": [1.0]}, "memory.rows"),
        ({"queue_ptr": torch.zeros(2).long()}, r"memory.queue_ptr must have one element, got shape \(2,\)"),
        ({"queue_ptr": None}, 'Missing key.*"memory.pointer"'),
        ({"queue_pointer": torch.zeros(1)}, 'Unexpected key.*"memory.queue_pointer"'),
    ],
)
def test_a_wrong_state_is_listed(change, match):
    module, _ = model(ids=True)
    state = {name: t for name, t in (Columns(K, D, False).state | change).items() if t is not None}
    with pytest.raises(RuntimeError, match=match) as caught:
        module.load_state_dict({f"memory.{name}": t for name, t in state.items()})
    assert '"head.weight"' in str(caught.value)  # beside what else is wrong
