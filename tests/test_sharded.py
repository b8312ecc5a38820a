"""Sharded queues and losses over groups of 1, 2 and 4 processes, against one process with all rows.

A process's gradient is that of the sum of all processes' losses. So the formulas of the oracle get the union
of the shards and all processes' rows, and their losses, reduced per process, are weighed and summed.
"""

import math
import os

import oracle
import pytest
import torch
import torch.distributed as dist
from processes import spawn
from sharded_worker import (
    CASES,
    DIM,
    QUEUES,
    WORLDS,
    Case,
    compiled,
    cotangents,
    every_world,
    inputs,
    keys_of,
    members,
    shard_size,
)

from relssl import FeatureQueue, shards
from relssl.functional import relation_loss

pytestmark = pytest.mark.xdist_group("sharded")  # The tests share the results of the processes.

worlds = pytest.mark.parametrize("world", WORLDS)
several = pytest.mark.parametrize("world", [2, 4])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Returns, for each number of processes, what each of them computed."""
    folder = tmp_path_factory.mktemp("shards")
    spawn(every_world, (str(folder),), 4, 200)
    load = lambda world, rank: torch.load(folder / f"{world} {rank}.pt", weights_only=False)  # noqa: E731
    return {world: [load(world, rank) for rank in range(world)] for world in WORLDS}


def of(results, world, name):
    """Returns what each process found in a case or scenario; fails with its error."""
    found = [process[name] for process in results[world]]
    for rank, one in enumerate(found):
        assert not isinstance(one, str), f"process {rank} of {world}:\n{one}"
    return found


# ---------------------------------------------------------------------------------- losses and gradients


class Whole:
    """A case in one process: all processes' arguments, the union of the shards, and the formula."""

    def __init__(self, case, world, found):
        self.case, self.world = case, world
        self.processes, self.temperatures = inputs(case, world)
        self.members = members(case, world)
        self.lengths = [len(next(iter(p.values()))) for p in self.processes]
        if "q" in self.processes[0]:
            self.lengths = [len(p["k"]) for p in self.processes]
        self.queue = None
        self.left = [None] * len(self.members)
        if case.size is not None:
            shards = found if case.sharded else found[:1]
            self.queue = torch.cat([f["rows"] for f in shards])
            assert len(self.queue) == case.size
            self.left = [self._left(p, shards) for p in self.processes]

    def _left(self, process, shards):
        """Returns for each row of a process the positions in the union that are not excluded, or None."""
        case, sizes = self.case, [len(f["rows"]) for f in shards]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        assert starts == [min(r * -(-case.size // len(shards)), case.size) for r in range(len(shards))]
        counts = [int(f["count"]) if case.filled else n for f, n in zip(shards, sizes, strict=True)]
        used = [s + i for s, n in zip(starts, counts, strict=True) for i in range(n)]
        n = len(process["k"] if "k" in process else next(iter(process.values())))
        if "ids" in process and (case.ids or case.excluded == "all"):
            of_queue = torch.cat([f["ids"] for f in shards]).tolist()
            return [[j for j in used if i < 0 or of_queue[j] != i] for i in process["ids"].tolist()]
        if "exclude" in process:
            return [[j for j in used if j != i] for i in process["exclude"].tolist()]
        return [used] * n if case.filled else None

    def joint(self, found):
        """Concatenates the processes' gradients, as of one process: temperatures' are summed."""
        grads = {}
        for name in found[0]["grads"]:
            parts = [f["grads"][name] for f in found]
            if name.startswith("tau") or (name == "queue" and not self.case.sharded):
                grads[name] = torch.stack(parts).sum(0)
            else:
                grads[name] = torch.cat(parts, dim=-2)
        return grads

    def evaluate(self, dtype):
        """Returns each process's outputs, and the gradients of the sum of their weighed outputs."""
        wide = torch.promote_types(dtype, torch.float32)
        names = [n for n, t in self.processes[0].items() if t.is_floating_point() and n != "keys"]
        x = {n: torch.cat([p[n] for p in self.processes], -2).to(dtype).requires_grad_() for n in names}
        x |= {n: t.to(wide, copy=True).requires_grad_() for n, t in self.temperatures.items()}
        if self.queue is not None:
            x["queue"] = self.queue.to(dtype, copy=True).requires_grad_()
        outputs = self.outputs(x)
        total = 0
        for rank, outs in zip(self.members, outputs, strict=True):
            weights = cotangents(self.case, self.world, rank, outs)
            total = total + sum((w * out).sum() for w, out in zip(weights, outs, strict=True))
        total.backward()
        grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in x.items()}
        return [tuple(o.detach() for o in outs) for outs in outputs], grads

    def outputs(self, x):
        case = self.case
        reduce = lambda rows: rows if case.reduction == "none" else getattr(rows, case.reduction)()  # noqa: E731
        parts = {n: t.split(self.lengths, -2) for n, t in x.items() if t.dim() and n != "queue"}
        shares = [{n: p[i] for n, p in parts.items()} for i in range(len(self.members))]
        queue = x.get("queue")
        if case.loss == "relation":
            return [
                (reduce(oracle.relation(s["q"], s["k"], queue, x["tau_s"], x["tau_t"], case.form, left)[0]),)
                for s, left in zip(shares, self.left, strict=True)
            ]
        if case.loss == "info_nce":
            return [
                (reduce(oracle.info_nce(s["q"], s["k"], queue, x["tau"], left)),)
                for s, left in zip(shares, self.left, strict=True)
            ]
        if case.loss == "logsumexp":
            return [
                oracle.logsumexp(s["x"], queue, x["tau"], left)
                for s, left in zip(shares, self.left, strict=True)
            ]
        if case.loss == "nt_xent" and not case.group:
            return [
                (reduce(oracle.nt_xent(s["z1"], s["z2"], queue, x["tau"], left)),)
                for s, left in zip(shares, self.left, strict=True)
            ]
        if case.loss == "nt_xent":
            left = None if self.left[0] is None else [rest for rows in self.left for rest in rows]
            rows = oracle.nt_xent(x["z1"], x["z2"], queue, x["tau"], left).view(2, -1)
            return [(reduce(part.flatten()),) for part in rows.split(self.lengths, 1)]
        if case.loss == "penalty":
            p = x["p1"]
            loss = math.log(p.shape[1]) - torch.special.entr(p.sum(0) / p.sum()).sum()
        else:
            loss = oracle.clusters(x["p1"], x["p2"], x["tau"], case.loss == "cluster_loss")
        return [(loss,)] * len(self.members)

    def scales(self):
        """Returns the sizes below which errors of the joint outputs and gradients do not count."""
        case, t = self.case, {n: float(t) for n, t in self.temperatures.items()}
        names = [n for n, x in self.processes[0].items() if x.is_floating_point() and n != "keys"]
        x = {n: torch.cat([p[n] for p in self.processes], -2).double() for n in names}
        queue = None if self.queue is None else self.queue.double()
        outs, _ = self.evaluate(torch.float64)
        g = [cotangents(case, self.world, r, o) for r, o in zip(self.members, outs, strict=True)]
        rows = sum(o[0].numel() for o in outs) if case.reduction == "none" else len(outs)
        ones = rows**0.5
        first = torch.cat([w[0].flatten() for w in g])
        if case.reduction == "mean" and "z1" in x:
            first = first.repeat_interleave(2 * self.lengths[0]) / (2 * self.lengths[0])
        if case.loss == "relation":
            return oracle.relation_scales(x["q"], x["k"], queue, t["tau_s"], t["tau_t"], first, ones)
        if case.loss == "info_nce":
            return oracle.info_nce_scales(x["q"], x["k"], queue, t["tau"], first, ones)
        if case.loss == "nt_xent":
            return oracle.nt_xent_scales(x["z1"], x["z2"], queue, t["tau"], first, ones)
        if case.loss == "logsumexp":
            return oracle.logsumexp_scales(x["x"], queue, t["tau"], first, torch.cat([w[1] for w in g]))
        scales = oracle.cluster_scales(
            x["p1"], x["p2"], t["tau"], case.loss == "cluster_loss", torch.ones(())
        )
        return {name: size * len(outs) for name, size in scales.items()}


def close(name, got, expected):
    """Compares float64 with a relative error of 1e-10, in norm; -inf must be equal."""
    assert got.shape == expected.shape, (name, got.shape, expected.shape)
    assert torch.equal(got.isinf(), expected.isinf()), name
    got, expected = (t.nan_to_num(posinf=0, neginf=0) if t.isinf().any() else t for t in (got, expected))
    error = (got - expected).norm()
    assert error <= 1e-10 * expected.norm() + 1e-13, (
        f"{name}: {error} of {expected.norm()}\n{got}\n{expected}"
    )


@worlds
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_are_those_of_one_process(results, world, case):
    found = [f for f in of(results, world, case) if f is not None]
    whole = Whole(case, world, found)
    exact, exact_grads = whole.evaluate(torch.float64)
    grads = whole.joint(found)
    assert grads.keys() == exact_grads.keys() - ({"tau"} if case.loss == "penalty" else set())
    for f in found:
        assert f["repeats"], "a second call gives another result"
    if case.dtype == torch.float64:
        for rank, f, outs in zip(whole.members, found, exact, strict=True):
            for i, (out, expected) in enumerate(zip(f["outputs"], outs, strict=True)):
                close(f"output {i} of {rank}", out, expected)
        for name, grad in grads.items():
            close(f"gradient of {name}", grad, exact_grads[name])
        return
    eager, eager_grads = whole.evaluate(case.dtype)
    scales = whole.scales()
    floor = oracle.FLOOR[case.dtype]
    for i in range(len(exact[0])):
        sides = [f["outputs"] for f in found], exact, eager
        joint = [torch.cat([outs[i].flatten() for outs in side]) for side in sides]
        oracle.check(f"output {i}", *joint, scales[str(i)], floor)
    for name, grad in grads.items():
        assert grad.dtype == (case.dtype if not name.startswith("tau") else torch.float32), name
        oracle.check(name, grad, exact_grads[name], eager_grads[name], scales[name], floor)


@several
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.loss == "relation" and c.dtype == torch.float64], ids=str
)
def test_entropy_is_that_of_one_process(results, world, case):
    found = [f for f in of(results, world, case) if f is not None]
    whole = Whole(case, world, found)
    for f, process, left in zip(found, whole.processes, whole.left, strict=True):
        _, entropy = oracle.relation(
            process["q"], process["k"], whole.queue, *whole.temperatures.values(), case.form, left
        )
        expected = entropy if case.reduction == "none" else getattr(entropy, case.reduction)()
        close("entropy", f["entropy"], expected)


@worlds
def test_a_row_without_any_other_has_no_loss_and_no_gradient(results, world):
    for loss in ("relation", "info_nce"):
        case = Case(loss, ids=True, excluded="all", reduction="sum", size=17)
        for f in of(results, world, case):
            assert torch.equal(f["ids"], torch.full_like(f["ids"], 7))
            assert f["grads"]["q"][0].norm() == 0 and f["grads"]["q"][1].norm() > 0


# ------------------------------------------------------------------------------------------- queues


def ordered(*columns):
    """Returns the rows of columns side by side, in lexical order."""
    rows = torch.cat([c.double().view(len(c), math.prod(c.shape[1:])) for c in columns], 1)
    return torch.tensor(sorted(rows.tolist()), dtype=torch.float64)


def union(states, filled=False):
    """Returns rows and ids of all shards, in lexical order; `filled`: those that have been written."""
    n = [int(s["count"]) if filled else len(s["rows"]) for s in states]
    rows, ids = (torch.cat([s[name][:m] for s, m in zip(states, n, strict=True)]) for name in ("rows", "ids"))
    return ordered(rows, ids)


@worlds
def test_shards_hold_what_a_replicated_queue_holds(results, world):
    found = of(results, world, "against_replicated")
    shards, replicated = ([pair[i] for pair in found] for i in range(2))
    assert torch.equal(union(shards), union(replicated[:1]))
    for shard, other in zip(shards, replicated, strict=True):
        assert torch.equal(other["rows"], replicated[0]["rows"])
        for name in ("loss", "q", "k"):
            close(name, shard[name], other[name])


@worlds
def test_a_shard_is_a_ring_of_own_keys(results, world):
    for rank, (states, length) in enumerate(of(results, world, "ring")):
        size = shard_size(17, world, rank)
        assert length == 17
        queue = FeatureQueue(size, DIM, dtype=torch.float64, ids=True, start="empty", gather=False)
        for found, times in zip(states, ([], range(3), range(3, 6), range(6, 30)), strict=True):
            if times:
                queue.enqueue(*keys_of(rank, times))
            for name, t in queue.named_buffers():
                assert torch.equal(found[name], t), (rank, times, name)


@worlds
def test_enqueueing_in_a_group_or_alone(results, world):
    found = of(results, world, "enqueue_in_group")
    ranks = members(Case("", group="some"), world)
    start = FeatureQueue(8, DIM, dtype=torch.float64).rows
    for rank in range(world):
        if rank not in ranks:
            assert found[rank]["stranger"].startswith("TypeError: group"), found[rank]["stranger"]
            continue
        one = found[rank]["some"]
        n = 2 * len(ranks)
        keys, ids = (torch.cat(t) for t in zip(*(keys_of(r, range(2)) for r in ranks), strict=True))
        assert torch.equal(one["rows"], torch.cat((keys, start[n:])))
        assert one["ids"].tolist() == [*ids.tolist(), *[-1] * (8 - n)]
        assert (int(one["pointer"]), int(one["count"])) == (n, n)
    alone = found[0]["alone"]
    assert torch.equal(alone["rows"], torch.cat((keys_of(0, range(3))[0], start[3:])))


@several
def test_different_numbers_of_keys(results, world):
    numbers = [3] + [4] * (world - 1)
    for found in of(results, world, "different_numbers"):
        assert found["even"].startswith("ValueError: ") and str(numbers).strip("[]") in found["even"]
        assert found["even unchanged"]
        expected = [100 * r + t for t in (50, 60) for r in range(world)]
        assert ring_ids(found["even state"], 20) == expected
        assert int(found["even state"]["count"]) == 2 * world
        assert found["uneven"] == "none" and found["none anywhere"] == "none"
        expected = [100 * r + 50 for r in range(world)]
        expected += [100 * r + t for r in range(world) for t in range(numbers[r])]
        expected += [100 * r + 60 for r in range(world)]
        assert ring_ids(found["uneven state"], 20) == expected[-20:]
        expected += [100 * r + t for r in range(1, world) for t in range(2)]
        assert ring_ids(found["none in rank 0"], 20) == expected[-20:]
        for name in ("uneven state", "none in rank 0"):
            state = found[name]
            filled = state["ids"] >= 0
            rows = torch.cat([keys_of(i // 100, [i % 100])[0] for i in state["ids"][filled].tolist()])
            assert torch.equal(state["rows"][filled], rows)


def ring_ids(state, size):
    """Returns the ids of the rows that have been written, the oldest first."""
    pointer, count = int(state["pointer"]), int(state["count"])
    return state["ids"].roll(-pointer)[size - count :].tolist()


def test_a_process_alone_in_a_group_ends_by_the_timeout(results):
    (error, seconds), _ = of(results, 2, "alone_in_a_group")
    assert error.startswith("RuntimeError: "), error
    assert 2 < seconds < 15


@several
def test_different_batches_raise_in_every_process(results, world):
    for found in of(results, world, "different_batches"):
        assert found.pop("afterwards") == "none"
        for name, error in found.items():
            assert error.startswith("ValueError: "), (name, error)
            assert "in every process" in error and "3" in error and "4" in error, name


@worlds
def test_distributed_tensors_are_refused(results, world):
    for found in of(results, world, "distributed_tensors"):
        for name, error in found.items():
            assert error.startswith("TypeError: "), (name, error)
            assert ".to_local()" in error and "sharded=True" in error, (name, error)


@several
def test_a_sharded_enqueue_communicates_nothing(results, world):
    for rank, found in enumerate(of(results, world, "enqueues_send_nothing")):
        assert found[True] == []
        assert any("gather" in name for name in found[False])  # The profiler records collectives.
        assert rank or found["alone"] == 4  # Its shard is full; nobody else took part.


def test_a_process_computes_its_share_of_the_products(results):
    """Logits and means for 64 own rows of 256 of width 16, then logits and the gradient's other part."""
    for own, whole in of(results, 4, "products"):
        assert own == 4 * 64 * 256 * 16
        assert whole == 2 * 256 * 256 * 16


def test_memory_is_that_of_a_shard(results):
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs Linux")
    expected = 2**18 * (32 * 4 + 8)
    for allocated, grown in of(results, 4, "memory"):
        assert allocated == expected + 16
        assert grown < 1.2 * expected


def ages(state):
    """Returns the times of the rows of keys_of, the oldest first; of the start's rows nothing."""
    pointer = int(state["pointer"])
    ids = state["ids"].roll(-pointer)
    return (ids[ids >= 0] % 100).tolist()


@pytest.fixture(scope="module")
def saved(results):
    return {name: [f[f"saved {name}"] for f in of(results, 2, "checkpoints")] for name in QUEUES}


@worlds
@pytest.mark.parametrize("name", QUEUES)
def test_checkpoints_load_in_other_numbers_of_processes(results, saved, world, name):
    found = of(results, world, "checkpoints")
    loaded, later = ([f[key] for f in found] for key in (name, f"{name} later"))
    before = saved[name]
    assert torch.equal(union(loaded), union(before))
    assert torch.equal(union(loaded, filled=True), union(before, filled=True))
    assert sum(int(s["count"]) for s in loaded) == sum(int(s["count"]) for s in before)
    everything = sorted(t for s in before for t in ages(s))
    for state in loaded:
        order, count = ages(state), int(state["count"])
        assert order == sorted(order), "older rows must be overwritten first"
        assert len(order) == count
        assert int(state["pointer"]) == count % len(state["rows"])
        if count:  # Rows of all ages; a smaller shard has newer ones, as it had if they were its own.
            third = (everything[-1] - everything[0]) / 3
            assert order[-1] >= everything[-1] - third
            assert order[0] <= everything[0] + third or len(state["rows"]) < len(loaded[0]["rows"])
    for state, after in zip(loaded, later, strict=True):  # Two rows each, which overwrote the oldest.
        room, n = len(state["rows"]) - int(state["count"]), len(state["rows"])
        expected = [*ages(state)[max(0, 2 - room) :], 1000 % 100, 1001 % 100]
        assert ages(after) == expected[-n:]
    for state, again in zip(later, [f[f"{name} copied"] for f in found], strict=True):
        assert_same_ring(state, again)
    if world == 2:
        for state, was in zip(loaded, before, strict=True):
            assert_same_ring(state, was)


def assert_same_ring(state, other):
    """Compares rows, ids and number bit for bit, from the oldest row on."""
    assert int(state["count"]) == int(other["count"])
    for name in ("rows", "ids"):
        one, two = (s[name].roll(-int(s["pointer"]), 0) for s in (state, other))
        assert torch.equal(one, two), name


@worlds
@pytest.mark.parametrize("name", QUEUES)
def test_the_state_of_an_unsharded_queue_loads(results, world, name):
    found = of(results, world, "from_unsharded")
    shards, whole = ([f[key] for f in found] for key in (name, f"whole {name}"))
    assert torch.equal(union(shards), union(whole[:1]))
    assert torch.equal(union(shards, filled=True), union(whole[:1], filled=True))
    for state in shards:
        assert ages(state) == sorted(ages(state)) and len(ages(state)) == int(state["count"])
    assert "size mismatch" in found[0]["wrong"]


def test_a_destroyed_group_is_not_the_next_of_its_name():
    queues, names = [], []
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        group = dist.new_group([0])
        names.append(group.group_name)
        queues.append(FeatureQueue(4, 2, group=group, sharded=True))
        queues[-1].enqueue(torch.ones(1, 2))
        if len(queues) == 2:
            with pytest.raises(RuntimeError, match="the process group has been destroyed"):
                queues[0].enqueue(torch.ones(1, 2))
        del group
        dist.destroy_process_group()
    assert names[0] == names[1]


def test_a_queue_on_the_meta_device_loads_no_state():
    state = FeatureQueue(9, 4, sharded=True).state_dict()
    with pytest.raises(RuntimeError, match="rows is on the meta device: call to_empty first"):
        FeatureQueue(9, 4, sharded=True, device="meta").load_state_dict(state)


def test_states_are_dealt_in_one_order(monkeypatch):
    """A set of names has another order in every process, which would mix up what they send."""
    dealt = []

    def deal(block, *_):
        dealt.append(block.dtype)
        return block

    monkeypatch.setattr(shards, "deal", deal)
    queue = FeatureQueue(8, DIM, ids=True, sharded=True)
    for state_dict in (queue.state_dict(), FeatureQueue(8, DIM, ids=True).state_dict()):
        dealt.clear()
        queue.load_state_dict(state_dict)
        assert sorted(dealt, key=str) == [torch.float32, torch.int64, torch.uint8]
        assert dealt == [torch.int64, torch.float32, torch.uint8]  # ids, rows, written


def is_runtime_error(error):
    return error.startswith("RuntimeError: ")


@several
def test_misuse(results, world):
    for found in of(results, world, "misuse"):
        assert found["few"].startswith("ValueError: ")
        for name, error in found["before"].items():
            assert is_runtime_error(error) and "torch.distributed" in error, (name, error)


@several
@pytest.mark.parametrize("how", ["twice", "func", "jvp", "vmap"])
def test_unsupported_derivatives_raise(results, world, how):
    for found in of(results, world, "misuse"):
        for name, error in found[how].items():
            assert is_runtime_error(error), (name, error)


@worlds
def test_copies_of_queues_and_losses_keep_their_group(results, world):
    for rank, found in enumerate(of(results, world, "copies")):
        names = [n for n in ("world", "some") if rank in members(Case("", group=n), world)]
        assert len(found) == 4 * len(names)
        assert all(all(equal) for equal in found.values()), found


@worlds
def test_enqueueing_before_backward_is_safe(results, world):
    for found in of(results, world, "enqueued_before_backward"):
        assert is_runtime_error(found.pop("learned"))
        assert len(found) == 9 and all(found.values()), found


@worlds
def test_states_of_modules_files_and_other_projects(results, world):
    found = of(results, world, "other_states")
    for one in found:
        for ring in one.get("rings", [])[1:]:
            assert_same_ring(one["rings"][0], ring)
        for name, t in one["meta"][0].items():
            assert torch.equal(t, one["meta"][1][name])
    moco = found[0]["moco"][1]["queue"].T
    shards = [one["moco"][0] for one in found]
    rows = torch.cat([shard["rows"] for shard in shards])
    assert torch.equal(ordered(rows), ordered(moco))
    assert sum(int(shard["count"]) for shard in shards) == 16
    oldest = torch.cat([shard["rows"][int(shard["pointer"])][None] for shard in shards])
    assert torch.equal(ordered(oldest), ordered(moco.roll(-3, 0)[:world]))


@worlds
def test_distributed_data_parallel_leaves_shards_alone(results, world):
    found = of(results, world, "data_parallel")
    for start, rows, *_ in found:
        assert torch.equal(start, rows)
    layer, x = found[0][2], torch.cat([f[4] for f in found])
    relation_loss(layer(x), x, torch.cat([f[0] for f in found])).backward()
    for f in found:
        close("weight", f[3], layer.weight.grad)


@worlds
def test_shards_start_with_rows_of_their_own(results, world):
    start = torch.cat([f[0] for f in of(results, world, "data_parallel")])
    assert len({tuple(row) for row in start.tolist()}) == 16
    torch.testing.assert_close(start.norm(dim=1), torch.ones(16).double())


@worlds
def test_autocast(results, world):
    found = of(results, world, "autocast")
    for i in range(2):
        rows = torch.cat([f[i][0] for f in found])
        for _, q, k, loss, grad in (f[i] for f in found):
            x = q.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                expected = relation_loss(x, k, rows)
            expected.backward()
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(grad, x.grad, rtol=3e-2, atol=1e-2)


@pytest.mark.slow
def test_compiled_losses_have_the_gradients_of_eager_code(tmp_path):
    spawn(compiled, (2, str(tmp_path)), 2, 300)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name in {name for name, _ in found}:
            eager, other = found[name, "eager"], found[name, "compiled"]
            assert not isinstance(eager, str), eager
            assert not isinstance(other, str), other
            assert eager.keys() == other.keys()
            for key in eager:
                close(f"{name} {key}", other[key].double(), eager[key].double())
