"""Losses that leave out queue rows by their ids, and those not filled yet, against the oracle row by row."""

import pytest
import torch
from checks import (
    BACKENDS,
    INTERPRETED,
    Excluded,
    backends_of,
    batch,
    check_info_nce,
    check_logsumexp,
    check_nt_xent,
    check_relation,
    every,
    to_device,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import unit
from torch.autograd import gradcheck, gradgradcheck

from relssl import FeatureQueue, _cpu
from relssl.functional import info_nce, nt_xent, queue_logsumexp, relation_loss
from relssl.nn import InfoNCELoss, NTXentLoss, RelationLoss

pytestmark = pytest.mark.usefixtures("one_thread")

HUGE = 2**62  # Ids that differ in their upper or their lower halves alone.
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Views, rows, size of the queue, width; ids are drawn of so many; rows that are filled.
SHAPES = [
    (None, 1, 1, 8, 1, None),  # nothing is left
    (None, 5, 300, 40, 3, None),  # a third is left out, as with classes
    (2, 37, 130, 16, 400, None),  # few are
    (3, 4, 70, 24, 2, 33),
    (None, 3, 40, 8, 5, 0),  # an empty queue
    (None, 33, 65, 8, 2, 64),
]


def drawn_ids(count, of):
    ids = torch.randint(0, of, (count,))
    apart = torch.tensor([0, HUGE, 2**32])[torch.randint(0, 3, (count,))]
    return torch.where(torch.rand(count) < 0.15, -1, ids + apart)


def drawn(backend, rows, size, of, filled=None):
    return Excluded(backend, drawn_ids(rows, of), drawn_ids(size, of), filled)


@pytest.mark.parametrize("shape", SHAPES[: 3 if INTERPRETED else None], ids=str)
@pytest.mark.parametrize("loss", ["kl", "ce", "info_nce", "nt_xent", "logsumexp"])
@every(*DTYPES)
def test_losses_and_gradients(dtype, loss, shape, backend):
    views, rows, size, dim, of, filled = shape
    q, k, queue = batch(views, rows, size, dim, dtype)
    out = drawn(backend, rows, size, of, filled)
    if loss == "info_nce":
        check_info_nce(q, k, queue, 0.2, backend, excluded=out)
    elif loss == "nt_xent":
        check_nt_xent(q if views is None else q[0], k, queue, 0.5, backend, "mean", excluded=out)
    elif loss == "logsumexp":
        if all(out.rows):  # An infinite lse is compared in test_rows_left_with_nothing.
            check_logsumexp(k, queue, 0.1, backend, excluded=out)
    else:
        check_relation(q, k, queue, 0.1, 0.04, loss, backend, excluded=out)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@backends_of(*BACKENDS)
def test_reductions(reduction, backend):
    q, k, queue = batch(2, 9, 50, 12, torch.float32)
    for filled in (None, 23):
        out = drawn(backend, 9, 50, 2, filled)
        check_relation(q, k, queue, 0.1, 0.04, "kl", backend, reduction, excluded=out)
        check_info_nce(q, k, queue, 0.2, backend, reduction, excluded=out)
        check_nt_xent(q[0], k, queue, 0.5, backend, reduction, excluded=out)


@pytest.mark.skipif(INTERPRETED, reason="slow")
@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 70), size=st.integers(1, 5000), dim=st.integers(1, 40),
    of=st.sampled_from([1, 2, 10, 10_000]), share=st.sampled_from([None, 0.0, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any_shape(backend, rows, size, dim, of, share, dtype, seed):
    torch.manual_seed(seed)
    size = min(size, 50_000 // rows)
    q, k, queue = batch(None, rows, size, dim, dtype)
    out = drawn(backend, rows, size, of, share if share is None else int(size * share))
    check_relation(q, k, queue, 0.1, 0.04, "kl", backend, drawn=True, excluded=out)
    check_nt_xent(q, k, queue, 0.5, backend, drawn=True, excluded=out)


def everything(q, k, queue, ids, backend, **others):
    """Returns all losses, unreduced."""
    how = {"ids": ids, "backend": backend, **others}
    loss, entropy = relation_loss(q, k, queue, reduction="none", return_entropy=True, **how)
    return (
        loss, entropy, info_nce(q, k, queue, reduction="none", **how),
        nt_xent(q, k, queue=queue, reduction="none", **how), *queue_logsumexp(k, queue, 0.1, **how),
    )  # fmt: skip


@backends_of(*BACKENDS)
def test_rows_left_with_nothing(backend):
    q, k, rows = to_device(backend, unit(3, 8), unit(3, 8), unit(40, 8))
    ids, queue_ids = to_device(backend, torch.tensor([5, -1, 7]), torch.full((40,), 5))
    inputs = [t.requires_grad_() for t in (q, k, rows)]
    loss, entropy, nce, xent, lse, mean = everything(q, k, rows, ids, backend, queue_ids=queue_ids)
    assert loss[0] == entropy[0] == nce[0] == 0 and lse[0] == -torch.inf and not mean[0].any()
    assert (loss[1:] > 0).all() and (nce[1:] > 0).all() and lse[1:].isfinite().all()
    alone = nt_xent(q, k, reduction="none", backend=backend)
    torch.testing.assert_close(xent[[0, 3]], alone[[0, 3]])
    assert (xent[[1, 2, 4, 5]] > alone[[1, 2, 4, 5]]).all()
    total = loss.sum() + nce.sum() + xent.sum() + mean.sum() + lse.exp().sum()
    grads = torch.autograd.grad(total, inputs, retain_graph=True)
    assert all(g.isfinite().all() for g in grads)
    of_row = torch.autograd.grad(loss[0] + nce[0] + mean[0].sum(), inputs)
    assert not any(g.any() for g in of_row)


@backends_of(*BACKENDS)
def test_an_empty_queue(backend):
    q, k = to_device(backend, unit(3, 8), unit(3, 8))
    queue = FeatureQueue(16, 8, start="empty", device=q.device)
    loss, entropy, nce, xent, lse, mean = everything(q.requires_grad_(), k, queue, None, backend)
    assert not loss.any() and not entropy.any() and not nce.any() and not mean.any()
    assert (lse == -torch.inf).all()
    torch.testing.assert_close(xent, nt_xent(q, k, reduction="none", backend=backend))
    (grad,) = torch.autograd.grad(loss.sum() + nce.sum(), q)
    assert not grad.any()
    queue.enqueue(k)
    for got, expected in zip(
        everything(q, k, queue, None, backend), everything(q, k, k, None, backend), strict=True
    ):
        torch.testing.assert_close(got, expected)


@backends_of(*BACKENDS)
def test_values_of_rows_not_filled_do_not_matter(backend):
    q, k, new = to_device(backend, unit(3, 8), unit(3, 8), unit(7, 8))
    found = []
    for value in (0.0, torch.nan):
        queue = FeatureQueue(16, 8, start="empty", device=q.device)
        queue.enqueue(new)
        queue.rows[7:] = value
        inputs = [t.requires_grad_() for t in (q, k, queue.rows)]
        losses = everything(q, k, queue, None, backend)
        total = sum(t.sum() for t in losses)
        first = torch.autograd.grad(total, inputs, retain_graph=True)
        again = torch.autograd.grad(total, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), inputs)
        found.append((*losses, *first, *second))
    for clean, dirty in zip(*found, strict=True):
        torch.testing.assert_close(dirty, clean)


@backends_of(*BACKENDS)
def test_own_copies_change_nothing(backend):
    """InfoNCE of a queue with the images' own keys, which are left out, is that of the other rows."""
    q, k, others = to_device(backend, unit(6, 16), unit(6, 16), unit(50, 16))
    ids = to_device(backend, torch.arange(6) + 100)
    rows = torch.cat((k, others[:20], k, others[20:]))
    of_others = torch.arange(50, device=ids.device)
    queue_ids = torch.cat((ids, of_others[:20], ids, of_others[20:]))
    how = {"reduction": "none", "backend": backend}
    for i in range(6):  # Each row's queue also has the other images' keys.
        rest = torch.cat((k[:i], k[i + 1 :], others, k[:i], k[i + 1 :]))
        got = info_nce(q, k, rows, ids=ids, queue_ids=queue_ids, **how)[i]
        torch.testing.assert_close(got, info_nce(q[i : i + 1], k[i : i + 1], rest, **how)[0])


@backends_of(*BACKENDS)
def test_exclude_is_the_case_of_indices(backend):
    x, queue = to_device(backend, unit(5, 8), unit(40, 8))
    exclude, index = to_device(backend, torch.tensor([3, -1, 39, 0, 3]), torch.arange(40))
    by_index = queue_logsumexp(x, queue, 0.1, exclude=exclude, backend=backend)
    by_ids = queue_logsumexp(x, queue, 0.1, ids=exclude, queue_ids=index, backend=backend)
    assert all(map(torch.equal, by_index, by_ids))


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instruction_sets(dtype, instruction_set):
    out = drawn("cpu", 37, 700, 3, 650)
    q, k, queue = batch(2, 37, 700, 24, dtype)
    check_relation(q, k, queue, 0.1, 0.04, "kl", f"cpu/{instruction_set}", excluded=out)


# ------------------------------------------------------------------------------------------- autograd


def leaves(*shapes):
    return [unit(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("filled", [None, 5])
def test_to_second_order(filled, backend):
    """The rows have other rows of their id, none, all (left with nothing), and no id."""
    ids, queue_ids = torch.tensor([1, 2, 3, -1]), torch.tensor([1, 3, 3, 3, 3, 3, 1])
    if filled is None:
        ids[2], queue_ids[1] = 3, 3
    out = Excluded("cpu", ids, queue_ids, filled)
    inputs = leaves((4, 3), (4, 3), (7, 3))
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for loss in (
        lambda q, k, rows, tau, **how: relation_loss(q, k, rows, student_temperature=tau, **how),
        lambda q, k, rows, tau, **how: info_nce(q, k, rows, temperature=tau, **how),
        lambda q, k, rows, tau, **how: nt_xent(q, k, queue=rows, temperature=tau, reduction="none", **how),
        lambda q, k, rows, tau, **how: queue_logsumexp(q, rows, tau, **how)[1],
    ):

        def call(q, k, rows, tau, loss=loss):
            queue, others = out.arguments(rows)
            return loss(q, k, queue, tau, backend=backend, **others)

        assert gradcheck(call, (*inputs, tau)) and gradgradcheck(call, (*inputs, tau))


def queue_with_ids(rows, of, start="random"):
    queue = FeatureQueue(40, rows.shape[1], ids=True, start=start)
    queue.enqueue(rows, torch.arange(len(rows)) % of)
    return queue


@pytest.mark.parametrize("start", ["random", "empty"])
def test_enqueue_before_backward_changes_nothing(start):
    q, k, ids = unit(6, 8), unit(6, 8), torch.arange(6)
    grads = []
    for early in (False, True):
        queue, leaf = queue_with_ids(unit(30, 8) * 0 + q[0], 5, start), q.clone().requires_grad_()
        losses = everything(leaf, k, queue, ids, "cpu")[:4]
        if early:
            queue.enqueue(k, ids)
        sum(t.sum() for t in losses).backward()
        grads.append(leaf.grad)
        if not early:
            continue
        loss = relation_loss(leaf, k, queue, ids=ids)
        ids_then = queue.ids.clone()
        queue.enqueue(k, ids)
        assert not torch.equal(queue.ids, ids_then)
        with pytest.raises(RuntimeError, match="the queue has changed"):
            torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.equal(*grads)


def test_ids_that_change_are_noticed():
    q, ids, queue_ids = unit(3, 8).requires_grad_(), torch.arange(3), torch.arange(20) % 4
    loss = info_nce(q, unit(3, 8), unit(20, 8), ids=ids, queue_ids=queue_ids)
    ids += 1
    with pytest.raises(RuntimeError, match="the queue has changed"):
        torch.autograd.grad(loss, q, create_graph=True)


@pytest.mark.parametrize("start", ["random", "empty"])
@pytest.mark.parametrize("dynamo", ["eager", "aot_eager"])
def test_compiled_step(dynamo, start):
    """Losses, gradients and an enqueue in one graph, as in eager code."""
    q, k, ids, taken = unit(6, 8), unit(6, 8), torch.arange(6), unit(30, 8)

    def step(q, rows, queue_ids, queue):
        losses = everything(q, k, queue, ids, "cpu")[:4]
        in_batch = everything(q, k, k, ids, "cpu", queue_ids=ids)[:4]  # one tensor for both
        learned = relation_loss(q, k, rows, ids=ids, queue_ids=queue_ids)
        total = sum(t.sum() for t in (*losses, *in_batch)) + learned
        queue.enqueue(k, ids)
        return total

    torch.compiler.reset()
    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend=dynamo)):
        queue = queue_with_ids(taken, 5, start)
        leaf, rows = q.clone().requires_grad_(), taken.clone().requires_grad_()
        total = run(leaf, rows, torch.arange(30) % 7, queue)
        total.backward()
        found.append((total.detach(), leaf.grad, rows.grad, queue.rows, queue.ids, queue.count))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_torch_func():
    q, k, rows = unit(4, 8), unit(4, 8), unit(20, 8)
    out = {"ids": torch.arange(4), "queue_ids": torch.arange(20) % 5}
    leaf = q.clone().requires_grad_()
    relation_loss(leaf, k, rows, **out).backward()
    torch.testing.assert_close(torch.func.grad(lambda q: relation_loss(q, k, rows, **out))(q), leaf.grad)
    one_by_one = torch.func.vmap(
        lambda q, k, i: info_nce(q[None], k[None], rows, ids=i[None], queue_ids=i * 0 + out["queue_ids"])
    )
    torch.testing.assert_close(one_by_one(q, k, out["ids"]), info_nce(q, k, rows, reduction="none", **out))


def test_modules_and_inference_tensors():
    q, k, rows = unit(4, 8).requires_grad_(), unit(4, 8), unit(20, 8)
    with torch.inference_mode():
        frozen = {"ids": torch.arange(4), "queue_ids": torch.arange(20) % 5}
    out = {name: t.clone() for name, t in frozen.items()}
    for module, loss in (
        (RelationLoss(), relation_loss),
        (InfoNCELoss(), info_nce),
        (NTXentLoss(), lambda q, k, queue, **how: nt_xent(q, k, queue=queue, **how)),
    ):
        results = [module(q, k, rows, **frozen), loss(q, k, rows, **out)]
        assert torch.equal(*results)
        assert torch.equal(*(torch.autograd.grad(r, q)[0] for r in results))


# --------------------------------------------------------------------------------------------- errors

IDS, OF_QUEUE = torch.arange(3), torch.arange(9)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"queue_ids": None}, ValueError, "ids and queue_ids must be given together"),
        ({"ids": None}, ValueError, "ids and queue_ids must be given together"),
        ({"ids": IDS.int()}, TypeError, "ids must be an int64 tensor, got torch.int32"),
        ({"ids": IDS.to_sparse()}, TypeError, "ids must be a dense tensor, got torch.sparse_coo"),
        ({"ids": [0, 1, 2]}, TypeError, "ids must be an int64 tensor, got list"),
        ({"ids": IDS.to_sparse()}, TypeError, "ids must be a dense tensor, got torch.sparse_coo"),
        ({"queue_ids": OF_QUEUE.float()}, TypeError, "queue_ids must be an int64 tensor, got torch.float32"),
        ({"ids": IDS[:2]}, ValueError, r"ids must be \[B\] = \[3\], got shape \(2,\)"),
        ({"queue_ids": OF_QUEUE[1:]}, ValueError, r"queue_ids must be \[K\] = \[9\], got shape \(8,\)"),
        ({"ids": IDS.to("meta")}, RuntimeError, "ids is on meta, but expected on cpu"),
        ({"queue_ids": OF_QUEUE.to("meta")}, RuntimeError, "queue_ids is on meta, but expected on cpu"),
        ({"queue": FeatureQueue(9, 8)}, ValueError, "queue_ids must be None: a FeatureQueue"),
        ({"queue": FeatureQueue(9, 8), "queue_ids": None}, ValueError, "the queue keeps none"),
    ],
)  # fmt: skip
def test_bad_ids(changes, error, message):
    good = {"queue": unit(9, 8), "ids": IDS, "queue_ids": OF_QUEUE}
    queue, *others = (good | changes).values()
    how = dict(zip(("ids", "queue_ids"), others, strict=True))
    for call in (
        lambda: relation_loss(unit(3, 8), unit(3, 8), queue, **how),
        lambda: info_nce(unit(3, 8), unit(3, 8), queue, **how),
        lambda: nt_xent(unit(3, 8), unit(3, 8), queue=queue, **how),
        lambda: queue_logsumexp(unit(3, 8), queue, 0.1, **how),
    ):
        with pytest.raises(error, match=message):
            call()


def test_ids_without_a_queue_and_beside_exclude():
    with pytest.raises(ValueError, match="ids exclude rows of a queue, but queue is None"):
        nt_xent(unit(3, 8), unit(3, 8), ids=IDS)
    with pytest.raises(ValueError, match="either ids or exclude can be given, not both"):
        queue_logsumexp(unit(3, 8), unit(9, 8), 0.1, ids=IDS, queue_ids=OF_QUEUE, exclude=IDS)
