"""Tests unusual calls of the losses: one tensor in several places, inference mode, meta and default devices,
activation checkpointing, temperatures of one element, keys of another dtype. The oracle is the reference
in float64, which is plain PyTorch.
"""

import copy
import pickle

import pytest
import torch
from oracle import unit
from torch import nn
from torch.utils.checkpoint import checkpoint

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
from relssl.nn import ClusterLoss, InfoNCELoss, NTXentLoss, RelationLoss

pytestmark = pytest.mark.usefixtures("one_thread")

B, K, D = 6, 12, 16


def primitive(x, queue, tau, **options):
    lse, mean = queue_logsumexp(x, queue, tau, **options)
    return lse.square().mean() + mean.square().sum()


def relation(q, k, queue, tau_s, tau_t, **options):
    return relation_loss(
        q, k, queue, student_temperature=tau_s, teacher_temperature=tau_t, **options
    ).square()  # whose gradient has a factor other than 1


# ------------------------------------------------------------------------ one tensor in several places

# Called with rows x [K, D], further rows y [K, D], a temperature t and a backend. What may require grad does.
ALIASED = {
    "q is k": lambda x, y, t, b: relation(x, x, y, t, 0.3, backend=b),
    "q is k, ce": lambda x, y, t, b: relation(x, x, y, t, 0.3, form="ce", reduction="sum", backend=b),
    "q is queue": lambda x, y, t, b: relation(x, y, x, t, 0.3, backend=b),
    "k is queue": lambda x, y, t, b: relation(x, y, y, t, 0.3, backend=b),
    "q is k is queue": lambda x, y, t, b: relation(x, x, x, t, 0.3, form="ce", backend=b),
    "one temperature": lambda x, y, t, b: relation(x, y, x.flip(0), t, t, backend=b),
    "slices of the queue": lambda x, y, t, b: relation(x[:B], x[B:], x, t, t, backend=b),
    "a view of k": lambda x, y, t, b: relation(x.view(1, K, D), x, y, t, 0.3, backend=b),
    "all views and temperatures": lambda x, y, t, b: relation(torch.stack((x, y)), x, y, t, t, backend=b),
    "positives are the queries": lambda x, y, t, b: info_nce(x, x, y, temperature=t, backend=b),
    "positives are the queue": lambda x, y, t, b: info_nce(x, y, y, temperature=t, backend=b),
    "queries are the queue": lambda x, y, t, b: info_nce(x, x, x, temperature=t, backend=b),
    "two views": lambda x, y, t, b: nt_xent(x, y, temperature=t, backend=b),
    "one view twice": lambda x, y, t, b: nt_xent(x, x, temperature=t, backend=b),
    "the batch as queue": lambda x, y, t, b: nt_xent(x, y, queue=x, temperature=t, backend=b),
    "clusters": lambda x, y, t, b: cluster_contrast(x.softmax(1), y.softmax(1), temperature=t, backend=b),
    "cluster_loss": lambda x, y, t, b: cluster_loss(x.softmax(1), y.softmax(1), temperature=t, backend=b),
    "one assignment twice": lambda x, y, t, b: cluster_contrast(x, x, temperature=t, backend=b),
    "x is queue": lambda x, y, t, b: primitive(x, x, t, backend=b),
    "x is queue, excluded": lambda x, y, t, b: primitive(x, x, t, exclude=torch.arange(K), backend=b),
    "x is part of the queue": lambda x, y, t, b: primitive(x[2:5], x, t, backend=b),
    "RelationLoss": lambda x, y, t, b: RelationLoss(
        student_temperature=t, teacher_temperature=t, backend=b
    )(x, x, y),
    "InfoNCELoss": lambda x, y, t, b: InfoNCELoss(temperature=t, backend=b)(x, x, x),
    "NTXentLoss": lambda x, y, t, b: NTXentLoss(temperature=t, backend=b)(x, y, y),
    "ClusterLoss": lambda x, y, t, b: ClusterLoss(temperature=t, backend=b)(x.softmax(1), x.softmax(1)),
}  # fmt: skip


def inputs(dtype, parameter=False):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(K, D, generator=generator, dtype=torch.float64) / 3 for _ in range(2))
    leaves = [t.to(dtype, copy=True) for t in (x, y, torch.tensor(0.2, dtype=torch.float64))]
    return [nn.Parameter(t) if parameter else t.requires_grad_() for t in leaves]


def exact(name):
    leaves = inputs(torch.float64)
    value = ALIASED[name](*leaves, "reference")
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return value.detach(), *(g.detach() for g in grads)


def close(name, got, want, tolerance=1e-5):
    error = (got.detach().double() - want).norm()
    assert error <= tolerance * max(float(want.norm()), 1), f"{name}: {error:.1e} of {want.norm():.1e}"


def check_gradients(name, value, leaves):
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    for got, want in zip((value, *grads), exact(name), strict=True):
        close(name, got, want)


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("name", ALIASED)
def test_aliased(name, backend):
    leaves = inputs(torch.float32)
    value = ALIASED[name](*leaves, backend)
    value.backward()
    check_gradients(name, value, leaves)


MODULES = [name for name in ALIASED if name.endswith("Loss")]


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        *((name, False) for name in ALIASED),
        *(pytest.param(n, True, marks=[pytest.mark.slow] * (n != "RelationLoss")) for n in MODULES),
    ],
)
def test_aliased_and_compiled(name, parameter):
    leaves = inputs(torch.float32, parameter)
    torch.compiler.reset()
    value = torch.compile(ALIASED[name], fullgraph=True, backend="aot_eager")(*leaves, "auto")
    value.backward()
    check_gradients(name, value, leaves)


@pytest.mark.slow
def test_aliased_and_compiled_by_inductor():
    """They are in one graph, since inductor is slow."""
    leaves = {name: inputs(torch.float32) for name in ALIASED}

    def everything(leaves):
        return {name: run(*leaves[name], "auto") for name, run in ALIASED.items()}

    values = torch.compile(everything, fullgraph=True)(leaves)
    sum(values.values()).backward()
    for name, value in values.items():
        check_gradients(name, value, leaves[name])


# ------------------------------------------------------------------ inputs that change behind the loss

# Called with x and y [B, D], a queue [K, D] and a temperature.
BEFORE_ENQUEUE = {
    "relation_loss": lambda x, y, queue, t: relation(x, y, queue, t, t),
    "relation_loss of views": lambda x, y, queue, t: relation(
        torch.stack((x, y)), y, queue, 0.1, t, form="ce", reduction="none"
    ).sum(),
    "info_nce": lambda x, y, queue, t: info_nce(x, y, queue, temperature=t).square(),
    "nt_xent": lambda x, y, queue, t: nt_xent(x, y, queue=queue, temperature=t).square(),
    "lse": lambda x, y, queue, t: queue_logsumexp(x, queue, t)[0].square().sum(),
    "lse and mean": lambda x, y, queue, t: primitive(x, queue, t),
    "mean": lambda x, y, queue, t: queue_logsumexp(x, queue, t)[1].square().sum(),
}
LEARNERS = "x", "y", "queue", "temperature"


def step_then_enqueue(name, leaves, ring):
    """Computes a loss and enqueues; the queue may require grad. Other inputs are changed in place, too."""
    x, y, t = leaves
    loss = BEFORE_ENQUEUE[name](x, y, ring.rows, t)
    ring.enqueue(x.detach() + 1)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(2)
    return loss


def moved(name, learner, dtype=torch.float32):
    """Returns x, y, the queue's rows and a temperature, of which one requires grad, or all; and the queue."""
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype) / 3 for _ in range(2))
    ring = FeatureQueue(K, D, dtype=torch.float32).to(dtype)
    tensors = x, y, ring.rows, torch.tensor(0.2, dtype=torch.float64).to(dtype)
    for at, t in enumerate(tensors):
        t.requires_grad_(learner in ("all", LEARNERS[at]))
    return tensors, ring


def check_step(name, learner, value, tensors):
    exact, _ = moved(name, learner, torch.float64)
    want = BEFORE_ENQUEUE[name](*exact)
    close(name, value, want.detach())
    if not want.requires_grad:
        return
    want.backward()
    for t, other in zip(tensors, exact, strict=True):
        zero = torch.zeros_like(other, requires_grad=False)
        got, grad = (zero if g is None else g for g in (t.grad, other.grad))
        close(f"{name}, {learner}", got, grad, 1e-4)  # A temperature's is a sum of larger terms.


@pytest.mark.parametrize("learner", ["all", *(pytest.param(n, marks=pytest.mark.slow) for n in LEARNERS)])
@pytest.mark.parametrize("name", BEFORE_ENQUEUE)
def test_enqueueing_behind_a_compiled_loss(name, learner):
    """In one graph, backward must use the queue as it was before the enqueue."""
    tensors, ring = moved(name, learner)
    x, y, _, t = tensors
    torch.compiler.reset()
    step = torch.compile(step_then_enqueue, fullgraph=True, backend="aot_eager")
    value = step(name, (x, y, t), ring)
    if value.requires_grad:
        value.backward()
    check_step(name, learner, value, tensors)
    assert int(ring.pointer) == B


@pytest.mark.slow
def test_enqueueing_behind_losses_compiled_by_inductor():
    cases = {
        (name, learner): moved(name, learner) for name in BEFORE_ENQUEUE for learner in [*LEARNERS, "all"]
    }

    def everything(cases):
        return {
            (name, learner): step_then_enqueue(name, (x, y, t), ring)
            for (name, learner), ((x, y, _, t), ring) in cases.items()
        }

    values = torch.compile(everything, fullgraph=True)(cases)
    sum(values.values()).backward()
    for (name, learner), value in values.items():
        check_step(name, learner, value, cases[name, learner][0])


# --------------------------------------------------------------------------------------- inference mode

# Called with q that requires grad, and the others from inference mode.
INFERENCE = {
    "relation_loss": lambda q, k, queue, tau, own, b: relation(q, k, queue, tau, tau, backend=b),
    "relation_loss, learning": lambda q, k, queue, tau, own, b: relation(
        k, q, q, tau, q.square().mean(), backend=b
    ),
    "info_nce": lambda q, k, queue, tau, own, b: info_nce(q, k, queue, temperature=tau, backend=b),
    "info_nce, learning": lambda q, k, queue, tau, own, b: info_nce(k, q, q, temperature=tau, backend=b),
    "nt_xent": lambda q, k, queue, tau, own, b: nt_xent(q, k, temperature=tau, queue=queue, backend=b),
    "nt_xent, the other view": lambda q, k, queue, tau, own, b: nt_xent(k, q, temperature=tau, backend=b),
    "cluster_contrast": lambda q, k, queue, tau, own, b: cluster_contrast(q, k, temperature=tau, backend=b),
    "queue_logsumexp": lambda q, k, queue, tau, own, b: primitive(q, queue, tau, exclude=own, backend=b),
    "queue_logsumexp, a queue that learns": lambda q, k, queue, tau, own, b: primitive(
        k, q, tau, exclude=own.clamp_max(B - 1), backend=b
    ),
    "RelationLoss": lambda q, k, queue, tau, own, b: RelationLoss(teacher_temperature=tau, backend=b)(
        q, k, queue
    ),
    "InfoNCELoss": lambda q, k, queue, tau, own, b: InfoNCELoss(temperature=tau, backend=b)(q, k, queue),
    "NTXentLoss": lambda q, k, queue, tau, own, b: NTXentLoss(temperature=tau, backend=b)(q, k, queue),
    "ClusterLoss": lambda q, k, queue, tau, own, b: ClusterLoss(temperature=tau, backend=b)(
        q.softmax(1), k.softmax(1)
    ),
}


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("name", INFERENCE)
def test_inference_tensors_where_no_gradient_goes(name, backend):
    values = unit(B, D), unit(K, D), torch.tensor(0.2), torch.tensor([0, -1, 3, 3, 11, 5])
    with torch.inference_mode():
        frozen = [t.clone() for t in values]
    q = unit(B, D)
    grads = []
    for others in (values, frozen):
        leaf = q.clone().requires_grad_()
        INFERENCE[name](leaf, *others, backend).backward()
        grads.append(leaf.grad)
    assert frozen[0].is_inference() and grads[0].norm() > 0
    assert torch.equal(*grads)


def test_double_backward_through_a_queue_of_inference_mode_raises():
    with torch.inference_mode():
        queue = unit(K, D)
    q = unit(B, D).requires_grad_()
    loss = relation_loss(q, unit(B, D), queue)
    with pytest.raises(RuntimeError, match=r"made under torch.inference_mode\(\)"):
        torch.autograd.grad(loss, q, create_graph=True)


@pytest.mark.parametrize("dynamo", ["eager", "aot_eager"])
@pytest.mark.parametrize("loss", [relation_loss, info_nce])
def test_inference_keys_under_compile(loss, dynamo):
    with torch.inference_mode():
        k, queue = unit(B, D), unit(K, D)
    q = unit(B, D)
    torch.compiler.reset()
    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend=dynamo)):
        leaf = q.clone().requires_grad_()
        run(leaf, k, queue).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def same_state(queue, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in queue.state_dict().items())


def test_feature_queue_built_and_filled_under_inference_mode():
    plain = FeatureQueue(K, D)
    keys = unit(5, D)
    with torch.inference_mode():
        queue = FeatureQueue(K, D)
        queue.enqueue(keys)
        frozen = keys.clone()
    queue.enqueue(frozen)
    plain.enqueue(keys)
    plain.enqueue(keys)
    assert same_state(plain, queue)
    q = unit(B, D).requires_grad_()
    loss = relation_loss(q, unit(B, D), queue)
    with torch.inference_mode():
        queue.enqueue(frozen)  # a change that is detected, too
    with pytest.raises(RuntimeError, match="queue has changed"):
        torch.autograd.grad(loss, q, create_graph=True)


def assign_state(queue):
    other = FeatureQueue(len(queue), D)
    other.load_state_dict({name: t.clone() for name, t in queue.state_dict().items()}, assign=True)
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda queue: queue.double().float(),
        copy.deepcopy,
        lambda queue: pickle.loads(pickle.dumps(queue)),
        assign_state,
        lambda queue: FeatureQueue(K, D, device="meta").to_empty(device="cpu"),
    ],
    ids=["to", "deepcopy", "pickle", "load_state_dict", "to_empty"],
)
def test_feature_queue_changed_under_inference_mode(change):
    with torch.inference_mode():
        queue, other = change(FeatureQueue(K, D)), change(FeatureQueue(K, D))
    other.reset()
    plain, keys = FeatureQueue(K, D), unit(5, D)
    assert same_state(plain, other)
    for ring in (queue, plain):
        ring.enqueue(keys)
    assert same_state(plain, queue)


# ------------------------------------------------------------------------------- meta and default devices


def test_feature_queue_from_the_meta_device():
    start = FeatureQueue(K, D, seed=3)
    queue = nn.Sequential(nn.Linear(2, 2), FeatureQueue(K, D, seed=3, device="meta"))
    assert queue[1].rows.is_meta
    queue.to_empty(device="cpu")
    assert same_state(queue[1], start)  # without a call, and
    queue[1].enqueue(unit(5, D))
    queue[1].reset_parameters()  # with the one that FSDP makes
    assert same_state(queue[1], start)


def test_moving_a_feature_queue_keeps_its_rows():
    queue = FeatureQueue(K, D)
    queue.enqueue(unit(5, D))
    before = copy.deepcopy(queue)
    assert same_state(queue.to("cpu").float(), before)
    assert queue.half().rows.dtype == torch.float16 and int(queue.pointer) == 5


@pytest.mark.parametrize("device", ["cpu", None])
def test_feature_queue_under_a_default_device(device):
    """A default device affects every factory call without a device; here it is meta in place of a GPU."""
    with torch.device("meta"):
        queue = FeatureQueue(K, D, device=device)
    assert queue.rows.device.type == (device or "meta")
    assert device is None or same_state(queue, FeatureQueue(K, D))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_meta_tensors(autocast, backend):
    """Every loss gives shapes and dtypes, forward and backward, without reading a value."""
    q, k, queue = (torch.empty(n, D, device="meta", requires_grad=True) for n in (B, B, K))
    tau = torch.empty((), device="meta", requires_grad=True)
    own = torch.empty(B, dtype=torch.int64, device="meta")
    b = {"backend": backend}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = {
            "relation": relation_loss(q, k, queue, student_temperature=tau, reduction="none", **b),
            "views": relation_loss(torch.stack((q, q)), k, queue, teacher_temperature=tau, **b)[None],
            "info_nce": info_nce(q, k, queue, temperature=tau, reduction="none", **b),
            "nt_xent": nt_xent(q, k, queue=queue, temperature=tau, reduction="none", **b),
            "clusters": cluster_loss(q, k, temperature=tau, **b)[None] + cluster_entropy_penalty(q)[None],
            "lse": queue_logsumexp(q, queue, tau, exclude=own, **b)[0],
            "mean": queue_logsumexp(q, queue, tau, **b)[1],
        }
    shapes = {"relation": (B,), "views": (1,), "info_nce": (B,), "nt_xent": (2 * B,), "clusters": (1,)}
    shapes |= {"lse": (B,), "mean": (B, D)}
    assert {name: tuple(t.shape) for name, t in found.items()} == shapes
    assert all(t.is_meta and t.dtype == torch.float32 for t in found.values())
    sum(t.sum() for t in found.values()).backward()
    for t in (q, k, queue, tau):
        assert t.grad.is_meta and t.grad.shape == t.shape
    queue = FeatureQueue(K, D, device="meta")
    queue.enqueue(k.detach())
    assert relation_loss(q, k, queue).shape == ()


def test_values_of_fake_tensors_are_not_read():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, queue, tau = torch.empty(B, D), torch.empty(K, D), torch.empty(())
        own = torch.empty(B, dtype=torch.int64)
        assert relation_loss(q, q, queue, student_temperature=tau).shape == ()
        assert queue_logsumexp(q, queue, tau, exclude=own)[1].shape == (B, D)


# --------------------------------------------------------------------------- temperatures and dtypes of k


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_temperature_of_one_element(shape):
    q, k, queue = unit(B, D), unit(B, D), unit(K, D)
    calls = [
        lambda t: relation(q, k, queue, t, t),
        lambda t: info_nce(q, k, queue, temperature=t),
        lambda t: nt_xent(q, k, temperature=t),
        lambda t: cluster_contrast(q.softmax(1), k.softmax(1), temperature=t),
        lambda t: primitive(q, queue, t),
        lambda t: RelationLoss(student_temperature=t, teacher_temperature=t)(q, k, queue),
    ]
    for call in calls:
        scalar, shaped = (nn.Parameter(torch.full(s, 0.2)) for s in ((), shape))
        values = call(scalar), call(shaped)
        sum(values).backward()
        assert torch.equal(*values) and values[0].shape == ()
        assert shaped.grad.shape == shape and torch.equal(shaped.grad.reshape(()), scalar.grad)


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.float64], ids=str)
def test_the_second_argument_takes_the_firsts_dtype(other):
    q, k, queue = unit(B, D, dtype=torch.bfloat16), unit(B, D, dtype=other), unit(K, D)
    losses = [
        lambda q, k: relation_loss(q, k, queue),
        lambda q, k: info_nce(q, k, queue),
        lambda q, k: nt_xent(q, k),
        lambda q, k: cluster_contrast(q.softmax(1), k.softmax(1).to(k.dtype)),
    ]
    for loss in losses:
        mixed = [t.clone().requires_grad_() for t in (q, k)]
        same = [t.to(torch.bfloat16, copy=True).requires_grad_() for t in (q, k)]
        values = loss(*mixed), loss(*same)
        sum(values).backward()
        torch.testing.assert_close(*values, rtol=2e-3, atol=2e-3)
        assert mixed[1].grad.dtype == other
        for a, b in zip(mixed, same, strict=True):
            torch.testing.assert_close(a.grad.float(), b.grad.float(), rtol=2e-2, atol=2e-3)


# ----------------------------------------------------------------------------------------- checkpointing

CHECKPOINTED = {
    "relation_loss": lambda q, k, m, b: relation_loss(q, k, m, backend=b),
    "info_nce": lambda q, k, m, b: info_nce(q, k, m, backend=b),
    "nt_xent": lambda q, k, m, b: nt_xent(q, k, queue=m, backend=b),
    "lse": lambda q, k, m, b: queue_logsumexp(q, m, 0.1, backend=b)[0].sum(),
    "mean": lambda q, k, m, b: queue_logsumexp(q, m, 0.1, backend=b)[1].square().sum(),
}


@pytest.mark.parametrize("learns", [False, True], ids=["plain queue", "queue that learns"])
@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing(name, backend, learns):
    """Forward runs again in backward: the same queue gives the same gradient, and a changed one raises."""
    queue = FeatureQueue(K, D)
    queue.rows.requires_grad_(learns)
    q, k = unit(B, D).requires_grad_(), unit(B, D)
    (want,) = torch.autograd.grad(CHECKPOINTED[name](q, k, queue, backend), q)
    again = checkpoint(CHECKPOINTED[name], q, k, queue, backend, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, q)[0], want)
    moved = checkpoint(CHECKPOINTED[name], q, k, queue, backend, use_reentrant=False)
    with torch.no_grad():
        queue.enqueue(k)
    with pytest.raises(RuntimeError, match="different metadata"):
        moved.backward()


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_checkpointing_notices_other_ids(backend):
    q, k, queue = unit(B, D).requires_grad_(), unit(B, D), unit(K, D)
    for loss in (relation_loss, info_nce, lambda q, k, queue, **how: nt_xent(q, k, queue=queue, **how)):
        queue_ids = torch.arange(K)
        moved = checkpoint(
            loss, q, k, queue, ids=torch.arange(B), queue_ids=queue_ids, backend=backend, use_reentrant=False
        )
        queue_ids += 1
        with pytest.raises(RuntimeError, match="different metadata"):
            moved.backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_hooks_may_read_what_is_saved_and_results_may_be_changed(backend):
    q, k, queue = unit(B, D).requires_grad_(), unit(B, D), FeatureQueue(K, D)
    (want,) = torch.autograd.grad(relation_loss(q, k, queue, backend=backend), q)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.min(), t)[1], lambda t: t):
        loss = relation_loss(q, k, queue, backend=backend)
    loss += 1
    assert torch.equal(torch.autograd.grad(loss, q)[0], want)
