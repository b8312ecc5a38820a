"""The code that test_sharded runs in 1, 2 and 4 processes: losses of shares of one batch, and scenarios.

Child processes import it. The test imports the cases, their inputs and the calls of the losses.
"""

import copy
import io
import os
import pickle
import time
import traceback
import zlib
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from relssl import FeatureQueue
from relssl.functional import (
    cluster_contrast,
    cluster_entropy_penalty,
    cluster_loss,
    info_nce,
    nt_xent,
    queue_logsumexp,
    relation_loss,
)
from relssl.nn import ClusterLoss, NTXentLoss

WORLDS = 2, 4, 1  # in this order: what two processes save, the others load
TIMEOUT = timedelta(seconds=20)
DIM, CLUSTERS = 8, 5
UNEVEN = 2, 5, 1, 4  # rows of each process; otherwise 3


@dataclass(frozen=True)
class Case:
    loss: str
    size: int | None = 24  # of the queue; None: no queue
    views: int | None = None
    form: str = "kl"
    reduction: str = "mean"
    ids: bool = False
    excluded: str = ""  # "own": `exclude`; "all": every row of the queue has the id of some of the batch
    filled: tuple[int, ...] = ()  # start="empty": how many keys each process enqueues
    uneven: bool = False
    group: str = ""  # of the loss: "world" or "some"
    sharded: bool = True
    dtype: torch.dtype = torch.float64
    backend: str = "auto"

    def __str__(self):
        """Names the test: what differs from the defaults."""
        plain = Case(self.loss)
        changes = [(n, v) for n, v in vars(self).items() if v != getattr(plain, n)]
        return " ".join([self.loss, *(f"{n}={str(v).replace('torch.', '')}" for n, v in changes)])


def _cases():
    for form in ("kl", "ce"):
        for reduction in ("none", "mean", "sum"):
            yield Case("relation", form=form, reduction=reduction)
    yield from (Case("relation", views=2, reduction=how) for how in ("none", "mean"))
    yield from (Case("info_nce", reduction=how, size=17) for how in ("none", "mean", "sum"))
    yield Case("info_nce", views=2, reduction="none")
    for reduction in ("none", "mean", "sum"):
        yield Case("nt_xent", reduction=reduction)
        yield Case("nt_xent", reduction=reduction, size=None, group="world")
        yield Case("nt_xent", reduction=reduction, size=17, group="world", ids=True)
        yield Case("nt_xent", reduction=reduction, sharded=False, group="world", ids=True)
    for loss in ("relation", "info_nce", "nt_xent", "logsumexp"):
        yield Case(loss, size=17)
        yield Case(loss, ids=True, reduction="none")
        yield Case(loss, size=17, ids=True, filled=(5, 0, 3, 1))
        yield Case(loss, ids=True, excluded="all", reduction="sum", size=17)
        yield Case(loss, uneven=True, size=17, ids=True, reduction="none")
        yield Case(loss, uneven=True)
    yield Case("logsumexp")
    yield Case("logsumexp", excluded="own", size=17)
    yield Case("logsumexp", excluded="own", size=17, filled=(5, 0, 3, 1))
    for backend in ("chunked", "reference", "cpu"):
        how = {"backend": backend, "dtype": torch.float32 if backend == "cpu" else torch.float64}
        yield Case("relation", ids=True, size=17, **how)
        yield Case("nt_xent", ids=True, size=17, group="world", **how)
    for loss in ("cluster_contrast", "cluster_loss", "penalty"):
        yield Case(loss, None, group="world")
        yield Case(loss, None, group="world", uneven=True)
    yield Case("nt_xent", None, group="some")
    yield Case("nt_xent", group="some", size=17, ids=True)
    yield Case("nt_xent", group="some", sharded=False)
    yield Case("cluster_loss", None, group="some")
    yield Case("relation", group="some", size=17)
    for dtype in (torch.float32, torch.bfloat16):
        for loss in ("relation", "info_nce", "nt_xent", "logsumexp"):
            yield Case(loss, dtype=dtype, reduction="none", ids=True)
        yield Case("nt_xent", dtype=dtype, group="world", size=None)
        yield Case("nt_xent", dtype=dtype, group="world", size=17)
        yield Case("cluster_loss", None, dtype=dtype, group="world")


CASES = list(dict.fromkeys(_cases()))


def members(case, world):
    """Returns the ranks that take part in a case."""
    return list(range(world)) if case.group != "some" else [1, 3] if world == 4 else [world - 1]


def inputs(case, world):
    """Returns the arguments of each process, as tensors by name, and the keys (and ids) that it enqueues."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case} {world}".encode()))
    unit = lambda *shape: nn.functional.normalize(  # noqa: E731
        torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1
    ).to(case.dtype)
    integers = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)  # noqa: E731
    processes = []
    for rank in members(case, world):
        n = UNEVEN[rank] if case.uneven else 3
        if case.loss in ("relation", "info_nce"):
            views = () if case.views is None else (case.views,)
            found = {"q": unit(*views, n, DIM), "k": unit(n, DIM)}
        elif case.loss == "nt_xent":
            found = {"z1": unit(n, DIM), "z2": unit(n, DIM)}
        elif case.loss == "logsumexp":
            found = {"x": unit(n, DIM)}
        else:
            names = ("p1",) if case.loss == "penalty" else ("p1", "p2")
            found = {name: (5 * unit(n, CLUSTERS)).softmax(1) for name in names}
        if case.ids:
            found["ids"] = integers(-1, 4, n)
        if case.excluded == "all":
            found["ids"] = torch.tensor([7, -1, 3])
        if case.excluded == "own":  # Of every process's rows; the last row excludes none.
            last = shard_size(case.size, len(members(case, world)), len(members(case, world)) - 1)
            owner = integers(0, len(members(case, world)), n)
            row = integers(0, last, n)
            found["exclude"] = owner * -(-case.size // len(members(case, world))) + row
            found["exclude"][-1] = -1
        if case.size is not None:
            keys = case.filled[rank] if case.filled else case.size // (world if case.sharded else 1) + 2
            found["keys"] = unit(keys, DIM)
            found["key_ids"] = integers(-1, 4, keys) if case.excluded != "all" else torch.full((keys,), 7)
        processes.append(found)
    shared = ("tau_s", "tau_t") if case.loss == "relation" else ("tau",)
    wide = torch.promote_types(case.dtype, torch.float32)
    temperatures = zip(shared, (0.25, 0.125), strict=False)
    return processes, {name: torch.tensor(tau, dtype=wide) for name, tau in temperatures}


def shard_size(size, processes, rank):
    """Returns how many rows a process holds: the chunks of torch.chunk."""
    most = -(-size // processes)
    return max(0, min(most, size - rank * most))


def cotangents(case, world, rank, outputs):
    """Returns the weights of a process's outputs: 1 for a reduced loss, else drawn."""
    seed = zlib.crc32(f"{case} {world} {rank}".encode())
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator).bfloat16().double()  # noqa: E731
    return [draw(out.shape).to(out.dtype) if out.dim() else torch.ones_like(out) for out in outputs]


def call(case, found, queue, group):
    """Computes a case's loss of one process's arguments; returns a tuple of outputs."""
    how = {"backend": case.backend}
    if case.loss not in ("logsumexp", "cluster_contrast", "cluster_loss", "penalty"):
        how["reduction"] = case.reduction
    if (case.size is not None and case.ids) or case.excluded == "all":
        how["ids"] = found["ids"]
    if case.loss == "relation":
        loss, entropy = relation_loss(
            found["q"], found["k"], queue, form=case.form, return_entropy=True,
            student_temperature=found["tau_s"], teacher_temperature=found["tau_t"], **how,
        )  # fmt: skip
        assert not entropy.requires_grad
        return (loss,), entropy
    if case.loss == "info_nce":
        return (info_nce(found["q"], found["k"], queue, temperature=found["tau"], **how),), None
    if case.loss == "nt_xent":
        how |= {"temperature": found["tau"], "group": group}
        return (nt_xent(found["z1"], found["z2"], queue=queue, **how),), None
    if case.loss == "logsumexp":
        exclude = found.get("exclude")
        return queue_logsumexp(found["x"], queue, found["tau"], exclude=exclude, **how), None
    if case.loss == "penalty":
        return (cluster_entropy_penalty(found["p1"], group=group),), None
    loss = {"cluster_contrast": cluster_contrast, "cluster_loss": cluster_loss}[case.loss]
    return (loss(found["p1"], found["p2"], temperature=found["tau"], group=group, **how),), None


def leaves(found):
    floats = {n: t for n, t in found.items() if t.is_floating_point() and n != "keys"}
    return {n: t.clone().requires_grad_() for n, t in floats.items()}


def compute(case, world, rank, groups):
    """Returns this process's outputs, gradients and shard, or None if it has no part."""
    if rank not in members(case, world):
        return None
    processes, temperatures = inputs(case, world)
    found = processes[members(case, world).index(rank)]
    group = groups[case.group or "world"]
    queue = None
    if case.size is not None:
        start = "empty" if case.filled else "random"
        how = {"ids": case.ids or case.excluded == "all", "uneven": case.uneven, "sharded": case.sharded}
        if case.group == "some":
            how["group"] = group
        queue = FeatureQueue(case.size, DIM, dtype=case.dtype, start=start, **how)
        if len(found["keys"]):
            queue.enqueue(found["keys"], found["key_ids"] if how["ids"] else None)
        queue.rows.requires_grad_()
    results = []
    for _ in range(2):
        variables = leaves(found | temperatures)
        outputs, entropy = call(case, found | variables, queue, group if case.group else None)
        torch.autograd.backward(outputs, cotangents(case, world, rank, outputs))
        grads = {name: t.grad for name, t in variables.items() if t.grad is not None}
        if queue is not None:
            grads["queue"], queue.rows.grad = queue.rows.grad, None
        results.append((tuple(t.detach() for t in outputs), grads, entropy))
    first, second = results
    same = all(map(torch.equal, first[0], second[0])) and first[1].keys() == second[1].keys()
    same = same and all(torch.equal(t, second[1][name]) for name, t in first[1].items() if t is not None)
    state = {} if queue is None else {n: t.detach() for n, t in queue._tensors().items()}
    return {"outputs": first[0], "grads": first[1], "entropy": entropy, "repeats": same, **state}


# ------------------------------------------------------------------------------- scenarios

SCENARIOS = []


def scenario(function):
    SCENARIOS.append(function)
    return function


class Setting:
    """A world size, this process's rank, the groups "world" and "some", and a folder of all worlds."""

    def __init__(self, world, rank, groups, folder, before):
        self.world, self.rank, self.groups, self.folder, self.before = world, rank, groups, folder, before


def message(run):
    """Returns the type and message of the error of run(), or "none"."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def state(queue):
    return {name: t.detach().clone() for name, t in queue._tensors().items()}


def keys_of(rank, times, dim=DIM):
    """Returns keys that carry their process and time: [rank, time, ...], float64, and ids 100 rank + time."""
    times = torch.tensor(list(times), dtype=torch.int64)
    keys = torch.zeros(len(times), dim, dtype=torch.float64)
    keys[:, 0], keys[:, 1] = rank, times
    keys[:, 2:] = torch.sin(keys[:, :1] * 7 + keys[:, 1:2] * torch.arange(1, dim - 1))
    return keys, 100 * rank + times


@scenario
def against_replicated(at):
    """Turns a sharded and a replicated queue alike: returns their rows and ids, and losses over both."""
    size = 8 * at.world * 2
    queues = [FeatureQueue(size, DIM, dtype=torch.float64, ids=True, sharded=s) for s in (True, False)]
    for step in range(7):
        keys, ids = keys_of(at.rank, range(4 * step, 4 * step + 4))
        for queue in queues:
            queue.enqueue(keys, ids)
    found = [state(queue) for queue in queues]
    q = nn.functional.normalize(torch.randn(3, DIM, dtype=torch.float64), dim=1)
    k = nn.functional.normalize(torch.randn(3, DIM, dtype=torch.float64), dim=1)
    for result, queue in zip(found, queues, strict=True):
        x = q.clone().requires_grad_()
        z = k.clone().requires_grad_()
        loss = relation_loss(x, z, queue, ids=torch.tensor([102, -1, 22]))
        (loss + info_nce(x, z, queue) + nt_xent(x, z, queue=queue)).backward()
        result |= {"loss": loss.detach(), "q": x.grad, "k": z.grad}
    return found


@scenario
def ring(at):
    """Returns a shard after enqueues of 3 rows, and of more rows than it has."""
    queue = FeatureQueue(17, DIM, dtype=torch.float64, ids=True, sharded=True, start="empty")
    found = [state(queue)]
    for times in (range(3), range(3, 6), range(6, 30)):
        queue.enqueue(*keys_of(at.rank, times))
        found.append(state(queue))
    return found, len(queue)


@scenario
def enqueue_in_group(at):
    """Enqueues in the group "some" alone; also without gathering, in rank 0 alone."""
    found = {}
    if at.rank in members(Case("", group="some"), at.world):
        queue = FeatureQueue(8, DIM, dtype=torch.float64, ids=True, group=at.groups["some"])
        queue.enqueue(*keys_of(at.rank, range(2)))
        found["some"] = state(queue)
    else:
        found["stranger"] = message(lambda: FeatureQueue(8, DIM, group=at.groups["some"]))
    if at.rank == 0:
        queue = FeatureQueue(8, DIM, dtype=torch.float64, ids=True, gather=False)
        queue.enqueue(*keys_of(0, range(3)))
        found["alone"] = state(queue)
    return found


@scenario
def different_numbers(at):
    """Enqueues 3 rows in rank 0 and 4 elsewhere: an error, or with `uneven` right; and then equally many."""
    found = {}
    times = range(3 if at.rank == 0 else 4)
    for name in ("even", "uneven"):
        how = {"dtype": torch.float64, "ids": True, "uneven": name == "uneven", "start": "empty"}
        queue = FeatureQueue(20, DIM, **how)
        queue.enqueue(*keys_of(at.rank, [50]))
        before = state(queue)
        found[name] = message(lambda queue=queue: queue.enqueue(*keys_of(at.rank, times)))
        found[f"{name} unchanged"] = all(torch.equal(t, before[n]) for n, t in state(queue).items())
        queue.enqueue(*keys_of(at.rank, [60]))
        found[f"{name} state"] = state(queue)
    queue.enqueue(*keys_of(at.rank, range(0 if at.rank == 0 else 2)))
    found["none in rank 0"] = state(queue)
    found["none anywhere"] = message(lambda: queue.enqueue(*keys_of(at.rank, [])))
    return found


@scenario
def alone_in_a_group(at):
    """Enqueues in rank 0 alone, in a group of both that waits some seconds."""
    if at.world != 2:
        return None
    group = dist.new_group(timeout=timedelta(seconds=4))
    queue = FeatureQueue(8, DIM, dtype=torch.float64, group=group)
    begun = time.monotonic()
    found = message(lambda: queue.enqueue(torch.ones(2, DIM).double())) if at.rank == 0 else ""
    seconds = time.monotonic() - begun
    dist.barrier()
    return found, seconds


@scenario
def different_batches(at):
    """Calls losses with different numbers of rows: returns the error of each process."""
    n = 3 if at.rank == 0 else 4
    x = torch.randn(n, DIM, dtype=torch.float64)
    queue = FeatureQueue(16, DIM, dtype=torch.float64, sharded=True)
    world = at.groups["world"]
    return {
        "nt_xent": message(lambda: nt_xent(x, x, group=world)),
        "nt_xent with a queue": message(lambda: nt_xent(x, x, group=world, queue=queue)),
        "relation": message(lambda: relation_loss(x, x, queue)),
        "info_nce": message(lambda: info_nce(x, x, queue)),
        "logsumexp": message(lambda: queue_logsumexp(x, queue, 0.1)),
        "afterwards": message(lambda: relation_loss(x[:3], x[:3], queue)),
    }


@scenario
def distributed_tensors(at):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (at.world,))
    full = torch.randn(4 * at.world, DIM)
    divided, replicated = (
        distribute_tensor(full, mesh, [Shard(0)]),
        distribute_tensor(full, mesh, [Replicate()]),
    )
    ids = distribute_tensor(torch.arange(4 * at.world), mesh, [Shard(0)])
    plain = torch.randn(4 * at.world, DIM)
    assignments = distribute_tensor(full.softmax(1), mesh, [Shard(0)])
    queue, with_ids = FeatureQueue(64, DIM), FeatureQueue(64, DIM, ids=True)
    found = {}
    for name, d in (("divided", divided), ("replicated", replicated)):
        for of, q in (("a queue", queue), ("a tensor", torch.randn(64, DIM))):
            found |= {
                f"q {name} {of}": message(partial(relation_loss, d, plain, q)),
                f"k {name} {of}": message(partial(relation_loss, plain, d, q)),
                f"info_nce q {name} {of}": message(partial(info_nce, d, d, q)),
                f"x {name} {of}": message(partial(queue_logsumexp, d, q, 0.1)),
            }
        found |= {
            f"queue {name}": message(partial(relation_loss, plain, plain, d)),
            f"queue of info_nce {name}": message(partial(info_nce, plain, plain, d)),
            f"queue of nt_xent {name}": message(partial(nt_xent, plain, plain, queue=d)),
            f"queue of logsumexp {name}": message(partial(queue_logsumexp, plain, d, 0.1)),
            f"z1 {name}": message(partial(nt_xent, d, d)),
            f"z2 {name}": message(partial(nt_xent, plain, d)),
            f"keys {name}": message(partial(queue.enqueue, d)),
        }
    found["p1"] = message(partial(cluster_loss, assignments, assignments))
    found["p"] = message(partial(cluster_entropy_penalty, assignments))
    found["ids"] = message(partial(with_ids.enqueue, plain, ids))
    found["ids of a loss"] = message(partial(relation_loss, plain, plain, with_ids, ids=ids))
    return found


def communicated(run):
    """Returns the names of the collectives that run() calls, as torch's profiler records them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    marks = "c10d", "gloo", "nccl"
    return sorted({e.name for e in profile.events() if any(mark in e.name for mark in marks)})


@scenario
def enqueues_send_nothing(at):
    """Returns the collectives of a sharded and of a gathering enqueue; then rank 0 enqueues alone."""
    found = {}
    for sharded in (True, False):
        queue = FeatureQueue(4 * at.world, DIM, dtype=torch.float64, ids=True, sharded=sharded)
        found[sharded] = communicated(lambda queue=queue: queue.enqueue(*keys_of(at.rank, range(3))))
    if at.rank == 0:
        queue = FeatureQueue(4 * at.world, DIM, dtype=torch.float64, sharded=True)
        for _ in range(3):
            queue.enqueue(keys_of(0, range(3))[0])
        found["alone"] = int(queue.count)
    return found


PRODUCTS = {  # with the position of their first factor among the arguments
    "aten::mm": 0, "aten::bmm": 0,
    "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1,
}  # fmt: skip
VECTORS = {"aten::mv", "aten::addmv", "aten::addmv_", "aten::dot"}


def multiply_adds(run):
    """Returns the multiply-adds of run()'s matrix products, from the shapes that torch's profiler records."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        run()
    total = 0
    for event in profile.events():
        assert event.name not in VECTORS, event.name
        if event.name in PRODUCTS:
            a, b = event.input_shapes[PRODUCTS[event.name] :][:2]
            total += torch.Size(a).numel() * b[-1]
    return total


@scenario
def products(at):
    """Returns the multiply-adds of NT-Xent and its gradient, of this process's 32 images and of all."""

    def count(n, group):
        generator = torch.Generator().manual_seed(at.rank)
        z = [torch.randn(n, 16, generator=generator).requires_grad_() for _ in range(2)]
        return multiply_adds(lambda: nt_xent(*z, group=group, backend="chunked").backward())

    return count(32, at.groups["world"]), count(32 * at.world, None)


def resident():
    """Returns the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@scenario
def memory(at):
    """Returns what a queue of 2^20 rows allocates in this process, and by how much the process grows."""
    if at.world != 4 or not Path("/proc/self/statm").exists():
        return None
    FeatureQueue(1024, 32, sharded=True)
    before = resident()
    queue = FeatureQueue(2**20, 32, dtype=torch.float32, ids=True, start="zeros", sharded=True)
    grown = resident() - before
    return sum(t.untyped_storage().nbytes() for t in queue._tensors().values()), grown


QUEUES = {
    "full": (32, "random", range(21)),
    "odd": (17, "random", range(13)),
    "begun": (32, "empty", range(5)),
    "odd and begun": (17, "empty", range(7)),
    "empty": (32, "empty", []),
}


def saved_queue(name, sharded=True, **how):
    size, start, _ = QUEUES[name]
    return FeatureQueue(size, DIM, dtype=torch.float64, ids=True, start=start, sharded=sharded, **how)


@scenario
def checkpoints(at):
    """Two processes save their queues; all worlds load them and enqueue then."""
    import torch.distributed.checkpoint as dcp

    found = {}
    for name, (_, _, times) in QUEUES.items():
        path = Path(at.folder) / f"queue {name}"
        if at.world == 2 and not path.exists():
            queue = saved_queue(name)
            for one in times:
                queue.enqueue(*keys_of(at.rank, [one]))
            dist.barrier()
            dcp.save({"queue": queue.state_dict()}, checkpoint_id=path)
            found[f"saved {name}"] = state(queue)
        queue = saved_queue(name)
        saved = {"queue": queue.state_dict()}
        dcp.load(saved, checkpoint_id=path)
        queue.load_state_dict(saved["queue"])
        found[name] = state(queue)
        queue.enqueue(*keys_of(at.rank, [1000, 1001]))
        found[f"{name} later"] = state(queue)
        again = saved_queue(name)
        again.load_state_dict(queue.state_dict())
        found[f"{name} copied"] = state(again)
    return found


@scenario
def from_unsharded(at):
    """Loads the state of a queue of one process, and one of another size."""
    found = {}
    for name, (_, _, times) in QUEUES.items():
        whole = saved_queue(name, sharded=False, gather=False)
        for i in range(2 * len(times)):
            whole.enqueue(*keys_of(0, [i]))
        queue = saved_queue(name)
        queue.load_state_dict(whole.state_dict())
        found[name], found[f"whole {name}"] = state(queue), state(whole)
    wrong = FeatureQueue(31, DIM, dtype=torch.float64, ids=True, gather=False)
    found["wrong"] = message(lambda: queue.load_state_dict(wrong.state_dict()))
    return found


@scenario
def misuse(at):
    x = torch.randn(3, DIM, dtype=torch.float64)
    queue = FeatureQueue(16, DIM, dtype=torch.float64, sharded=True)
    world = at.groups["world"]

    def twice(loss):
        z = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(z), z, create_graph=True)
        grad.square().sum().backward()

    losses = {
        "relation": lambda z: relation_loss(z, x, queue),
        "info_nce": lambda z: info_nce(z, x, queue),
        "nt_xent over a queue": lambda z: nt_xent(z, x, queue=queue),
        "logsumexp": lambda z: queue_logsumexp(z, queue, 0.1)[0].sum(),
        "nt_xent": lambda z: nt_xent(z, x, group=world),
        "cluster_loss": lambda z: cluster_loss(z.softmax(1), x.softmax(1), group=world),
        "cluster_contrast": lambda z: cluster_contrast(z.softmax(1), x.softmax(1), group=world),
    }
    found = {
        "few": message(lambda: FeatureQueue(at.world - 1, DIM, sharded=True)),
        "before": {
            "relation": message(lambda: relation_loss(x, x, at.before)),
            "info_nce": message(lambda: info_nce(x, x, at.before)),
            "nt_xent": message(lambda: nt_xent(x, x, queue=at.before)),
            "logsumexp": message(lambda: queue_logsumexp(x, at.before, 0.1)),
            "enqueue": message(lambda: at.before.enqueue(x)),
            "state_dict": message(at.before.state_dict),
            "load": message(lambda: at.before.load_state_dict(queue.state_dict())),
        },
        "twice": {name: message(partial(twice, loss)) for name, loss in losses.items()},
        "func": {name: message(partial(torch.func.grad(loss), x)) for name, loss in losses.items()},
        "jvp": {name: message(partial(torch.func.jvp, loss, (x,), (x,))) for name, loss in losses.items()},
        "vmap": {
            name: message(partial(torch.func.vmap(loss), torch.stack([x, x])))
            for name, loss in losses.items()
        },
    }
    return found


@scenario
def copies(at):
    """Copies and pickles queues and losses of a group, which work as before."""
    found = {}
    for name in ("world", "some"):
        if at.rank not in members(Case("", group=name), at.world):
            continue
        group = at.groups[name]
        for sharded in (False, True):
            queue = FeatureQueue(8, DIM, dtype=torch.float64, group=group, sharded=sharded)
            made = [copy.deepcopy(queue), pickle.loads(pickle.dumps(queue))]
            for each in (queue, *made):
                each.enqueue(keys_of(at.rank, range(2))[0])
            assert all(torch.equal(each.rows, queue.rows) for each in made)
            x = torch.randn(3, DIM, dtype=torch.float64)
            expected = relation_loss(x, x + 1, queue)
            found[name, sharded] = [torch.equal(relation_loss(x, x + 1, q), expected) for q in made]
        z = torch.randn(2, 3, DIM, dtype=torch.float64)
        p = z.softmax(-1)
        for module, call, arguments in (
            (NTXentLoss(group=group), nt_xent, z),
            (ClusterLoss(group=group), cluster_loss, p),
        ):
            t = {"temperature": module.temperature}
            expected = call(*arguments, **t, group=group)
            made = [module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
            found[name, call.__name__] = [torch.equal(each(*arguments), expected) for each in made]
    return found


@scenario
def enqueued_before_backward(at):
    """Returns whether enqueueing before backward leaves gradients alone, and errors where it cannot."""
    world, found = at.groups["world"], {}
    x, y = torch.randn(2, 3, DIM, dtype=torch.float64)
    losses = {"logsumexp": lambda z, tau, queue: queue_logsumexp(z, queue, tau)[0]}
    for how in ("mean", "none"):
        losses |= {
            f"relation {how}": partial(relation_loss, reduction=how),
            f"info_nce {how}": partial(info_nce, reduction=how),
            f"nt_xent {how}": partial(nt_xent, reduction=how),
            f"nt_xent of a group {how}": partial(nt_xent, reduction=how, group=world),
        }

    def value(name, z, tau, queue):
        loss = losses[name]
        if name == "logsumexp":
            return loss(z, tau, queue)
        if name.startswith("relation"):
            return loss(z, y, queue, student_temperature=tau)
        if name.startswith("info_nce"):
            return loss(z, y, queue, temperature=tau)
        return loss(z, y, queue=queue, temperature=tau)

    def gradients(name, enqueue, learned=False):
        queue = FeatureQueue(16, DIM, dtype=torch.float64, sharded=True)
        queue.rows.requires_grad_(learned)
        z, tau = x.clone().requires_grad_(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        loss = value(name, z, tau, queue).sum()
        if enqueue:
            queue.enqueue(keys_of(at.rank, range(3))[0])
        loss.backward()
        return z.grad, tau.grad

    for name in losses:
        found[name] = all(map(torch.equal, gradients(name, False), gradients(name, True)))
    found["learned"] = message(lambda: gradients("relation mean", True, learned=True))
    return found


@scenario
def other_states(at):
    """Loads states of a child module, of torch.save and of MoCo, in a group, and after to_empty."""
    found = {}
    if at.rank in members(Case("", group="some"), at.world):
        make = partial(FeatureQueue, 17, DIM, ids=True, sharded=True, group=at.groups["some"])
        keys, ids = keys_of(at.rank, range(5))
        parent, other = nn.ModuleDict({"memory": make()}), nn.ModuleDict({"memory": make()})
        parent["memory"].enqueue(keys.float(), ids)
        file = io.BytesIO()
        torch.save(parent.state_dict(), file)
        other.load_state_dict(parent.state_dict())
        loaded = make()
        names = {
            name.removeprefix("memory."): t for name, t in torch.load(io.BytesIO(file.getvalue())).items()
        }
        loaded.load_state_dict(names)
        found["rings"] = [state(queue) for queue in (parent["memory"], other["memory"], loaded)]
    generator = torch.Generator().manual_seed(0)
    moco = {"queue": torch.randn(DIM, 16, generator=generator), "queue_ptr": torch.tensor([3])}
    queue = FeatureQueue(16, DIM, sharded=True)
    queue.load_state_dict(moco)
    found["moco"] = state(queue), moco
    meta = FeatureQueue(17, DIM, device="meta", sharded=True).to_empty(device="cpu")
    found["meta"] = state(meta), state(FeatureQueue(17, DIM, sharded=True))
    return found


class Model(nn.Module):
    def __init__(self, sharded):
        super().__init__()
        self.layer = nn.Linear(DIM, DIM).double()
        self.queue = FeatureQueue(16, DIM, dtype=torch.float64, sharded=sharded)

    def forward(self, x):
        return relation_loss(self.layer(x), x, self.queue)


@scenario
def data_parallel(at):
    """Trains with the queue inside DistributedDataParallel: returns shards, and the averaged gradient."""
    torch.manual_seed(0)
    model = Model(sharded=True)
    start = model.queue.rows.clone()
    parallel = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(at.world * 3, DIM, dtype=torch.float64)
    for _ in range(2):
        model.zero_grad()
        parallel(x[3 * at.rank :][:3]).backward()
    return start, state(model.queue)["rows"], model.layer, model.layer.weight.grad, x[3 * at.rank :][:3]


@scenario
def autocast(at):
    """Returns the loss and its gradient under autocast, over a bfloat16 and over a float32 queue."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        queue = FeatureQueue(16, DIM, dtype=dtype, sharded=True)
        generator = torch.Generator().manual_seed(at.rank)
        q, k = torch.randn(2, 3, DIM, generator=generator)
        q.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = relation_loss(q, k, queue)
        loss.backward()
        found.append((queue.rows, q.detach(), k, loss.detach(), q.grad))
    return found


# --------------------------------------------------------------------------------- processes


def attempt(run):
    try:
        return run()
    except Exception:
        return traceback.format_exc()


def one_world(world, rank, folder, before, turn):
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous{turn}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    some = dist.new_group(members(Case("", group="some"), world))
    groups = {"world": dist.group.WORLD, "some": some}
    found = {}
    for case in CASES:
        torch.manual_seed(rank)
        found[case] = attempt(partial(compute, case, world, rank, groups))
    at = Setting(world, rank, groups, folder, before)
    for run in SCENARIOS:
        torch.manual_seed(rank)
        begun = time.monotonic()
        found[run.__name__] = attempt(partial(run, at))
        found[f"seconds {run.__name__}"] = time.monotonic() - begun
    dist.destroy_process_group()
    torch.save(found, f"{folder}/{world} {rank}")
    os.rename(f"{folder}/{world} {rank}", f"{folder}/{world} {rank}.pt")


def every_world(rank, folder):
    """Runs worlds of 2, 4 and 1 processes in turn, as far as this process belongs to them."""
    torch.set_num_threads(1)
    before = FeatureQueue(16, DIM, dtype=torch.float64, sharded=True)  # There is no group yet.
    for turn, world in enumerate(WORLDS):
        while turn and not Path(f"{folder}/{WORLDS[turn - 1]} 0.pt").exists():
            time.sleep(0.05)  # The test limits the time. A group would wait, too, but not for so long.
        if rank < world:
            one_world(world, rank, folder, before, turn)


def compiled(rank, world, folder):
    """Returns gradients of compiled and eager losses over a sharded queue and over a group."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=100)
    )
    queue = FeatureQueue(17, DIM, dtype=torch.float64, ids=True, sharded=True)
    queue.enqueue(*keys_of(rank, range(4)))
    queue.rows.requires_grad_()
    torch.manual_seed(rank)
    q, k = torch.randn(2, 3, DIM, dtype=torch.float64)
    ids = torch.tensor([101, 2, -1])
    found = {}
    for name, loss in {
        "relation": lambda q, k, tau: relation_loss(q, k, queue, ids=ids, student_temperature=tau),
        "nt_xent": lambda q, k, tau: nt_xent(q, k, temperature=tau, group=dist.group.WORLD),
        "both": lambda q, k, tau: nt_xent(q, k, temperature=tau, queue=queue, group=dist.group.WORLD),
        "clusters": lambda q, k, tau: cluster_loss(
            q.softmax(1), k.softmax(1), temperature=tau, group=dist.group.WORLD
        ),
    }.items():
        for way, run in {"eager": loss, "compiled": torch.compile(loss, fullgraph=True)}.items():
            x, z, tau = q.clone(), k.clone(), torch.tensor(0.2, dtype=torch.float64)
            for t in (x, z, tau):
                t.requires_grad_()
            queue.rows.grad = None

            def step(run=run, x=x, z=z, tau=tau):
                value = run(x, z, tau)
                value.backward()
                return {"loss": value.detach(), "q": x.grad, "k": z.grad, "tau": tau.grad} | (
                    {} if queue.rows.grad is None else {"queue": queue.rows.grad.clone()}
                )

            found[name, way] = attempt(step)
    queues = {}
    for way in ("eager", "compiled"):
        for sharded in (False, True):
            queues[way, sharded] = FeatureQueue(17, DIM, dtype=torch.float64, ids=True, sharded=sharded)
            enqueue = queues[way, sharded].enqueue
            run = torch.compile(enqueue, fullgraph=True) if way == "compiled" else enqueue
            found[f"enqueue sharded={sharded}", way] = attempt(
                lambda run=run, queue=queues[way, sharded]: [run(*keys_of(rank, range(4))), state(queue)][1]
            )
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
