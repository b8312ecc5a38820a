"""Bad input raises at the call, names the argument, and leaves everything as it was."""

import numpy as np
import pytest
import torch
from oracle import unit

from relssl import FeatureQueue
from relssl.backends import cpu
from relssl.functional import cluster_contrast, info_nce, queue_logsumexp, relation_loss

B, K, D = 3, 7, 8


def relation(a):
    return relation_loss(
        a["q"], a["k"], a["queue"], student_temperature=a["tau"], teacher_temperature=a["tau_t"],
        **a["options"],
    )  # fmt: skip


def nce(a):
    return info_nce(a["q"], a["k"], a["queue"], temperature=a["tau"], **a["options"])


def logsumexp(a):
    return queue_logsumexp(a["q"], a["queue"], a["tau"], exclude=a["exclude"], **a["options"])[0]


CALLS = {"relation_loss": relation, "info_nce": nce, "queue_logsumexp": logsumexp}
ALL, PAIRS = list(CALLS), ["relation_loss", "info_nce"]


def good():
    return {
        "q": unit(B, D), "k": unit(B, D), "queue": unit(K, D), "tau": 0.1, "tau_t": 0.04,
        "exclude": None, "options": {},
    }  # fmt: skip


def refuses(name, changes, error, match):
    """Checks that the changed call raises, and changes neither arguments nor the result of a later call."""
    torch.manual_seed(0)
    arguments = good()
    before = CALLS[name](arguments)
    bad = {**arguments, **changes}
    tensors = {n: t for n, t in bad.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    copies = {n: (t.clone(), t._version, t.requires_grad) for n, t in tensors.items()}
    with pytest.raises(error, match=match):
        CALLS[name](bad)
    for n, t in tensors.items():
        copy, version, requires_grad = copies[n]
        assert torch.equal(t.nan_to_num(), copy.nan_to_num()), n
        assert (t._version, t.requires_grad) == (version, requires_grad), n
    assert torch.equal(CALLS[name](arguments), before)


def argument(name, loss):
    """Returns the name that a loss has for q or tau."""
    if loss == "queue_logsumexp":
        return {"q": "x", "tau": "temperature"}.get(name, name)
    if loss == "info_nce":
        return {"tau": "temperature"}.get(name, name)
    return {"tau": "student_temperature", "tau_t": "teacher_temperature"}.get(name, name)


# ---------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("which", ["q", "k", "queue"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_wrong_dtype(dtype, which, loss):
    if which == "k" and loss == "queue_logsumexp":
        return
    bad = torch.ones(K if which == "queue" else B, D).to(dtype)
    name = argument(which, loss)
    refuses(loss, {which: bad}, TypeError, rf"^{name} must be float32, .*got {dtype}")


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("which", ["q", "k", "queue"])
def test_not_a_tensor(which, loss):
    if which == "k" and loss == "queue_logsumexp":
        return
    refuses(loss, {which: [[1.0]]}, TypeError, rf"^{argument(which, loss)} must be a tensor, got list")


# ---------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"q": torch.ones(D)}, r"must be \[.*\], got shape \(8,\)"),
        ({"q": torch.ones(1, 2, B, D)}, r"must be \[.*\], got shape \(1, 2, 3, 8\)"),
        ({"q": torch.ones(0, D)}, r"is empty: shape \(0, 8\)"),
        ({"q": torch.ones(B, D + 1)}, r"queue has rows of width 8, but [qx] of width 9"),
        ({"queue": torch.ones(D)}, r"queue must be \[K, D\], got shape \(8,\)"),
        ({"queue": torch.ones(1, K, D)}, r"queue must be \[K, D\], got shape \(1, 7, 8\)"),
        ({"queue": torch.ones(0, D)}, r"queue is empty: shape \(0, 8\)"),
        ({"queue": torch.ones(K, D - 1)}, r"queue has rows of width 7, but [qx] of width 8"),
    ],
)
def test_shapes(changes, match, loss):
    refuses(loss, changes, ValueError, match)


def test_views_are_for_the_losses_only():
    refuses("queue_logsumexp", {"q": torch.ones(2, B, D)}, ValueError, r"x must be \[R, D\]")


@pytest.mark.parametrize("loss", PAIRS)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"k": torch.ones(1, B, D)}, r"k must be \[B, D\], got shape \(1, 3, 8\)"),
        ({"k": torch.ones(B - 1, D)}, r"k must have .*q \(3, 8\), got \(2, 8\)"),
        ({"k": torch.ones(B, D + 1)}, r"k must have .*q \(3, 8\), got \(3, 9\)"),
        # One key would broadcast silently.
        ({"k": torch.ones(1, D)}, r"k must have .*q \(3, 8\), got \(1, 8\)"),
        ({"q": torch.ones(2, B + 1, D)}, r"k must have .*q \(2, 4, 8\), got \(3, 8\)"),
    ],
)
def test_shapes_of_pairs(changes, match, loss):
    refuses(loss, changes, ValueError, match)


# ---------------------------------------------------------------------------------- temperatures


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("which", ["tau", "tau_t"])
@pytest.mark.parametrize("value", [0, 0.0, -0.1, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["number", "tensor", "parameter"])
def test_bad_temperature(kind, value, which, loss):
    if which == "tau_t" and loss != "relation_loss":
        return
    match = f"^{argument(which, loss)} must be positive and finite, got {float(value)}|got 0$"
    if kind != "number":
        value = torch.tensor(float(value), requires_grad=kind == "parameter")
    refuses(loss, {which: value}, ValueError, match)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (torch.full((2,), 0.1), ValueError, r"must be a number or a tensor of one element, got shape \(2,\)"),
        (torch.full((B, 1), 0.1), ValueError, r"tensor of one element, got shape \(3, 1\)"),
        (torch.full((0,), 0.1), ValueError, r"tensor of one element, got shape \(0,\)"),
        (torch.full((1,), -0.1), ValueError, "must be positive and finite, got -0.1"),
        (torch.tensor(1), TypeError, "must be a number or a floating-point tensor, got torch.int64"),
        ("0.1", TypeError, "must be a number or a tensor of one element, got str"),
        (None, TypeError, "must be a number or a tensor of one element, got NoneType"),
        (True, TypeError, "must be a number or a tensor of one element, got bool"),
    ],
)
def test_not_a_temperature(value, error, match, loss):
    refuses(loss, {"tau": value}, error, f"^{argument('tau', loss)} .*{match}|{match}")


# --------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("loss", ALL)
def test_unknown_backend(loss):
    match = "backend must be one of auto, .*chunked.*; got 'fastest'"
    refuses(loss, {"options": {"backend": "fastest"}}, ValueError, match)


@pytest.mark.parametrize("loss", PAIRS)
def test_unknown_reduction(loss):
    match = "reduction must be one of mean, sum, none; got 'batchmean'"
    refuses(loss, {"options": {"reduction": "batchmean"}}, ValueError, match)


def test_unknown_form():
    match = "form must be one of kl, ce; got 'js'"
    refuses("relation_loss", {"options": {"form": "js"}}, ValueError, match)


# --------------------------------------------------------------------------------------- exclude


@pytest.mark.parametrize(
    ("exclude", "error", "match"),
    [
        (torch.tensor([0, K, 1]), ValueError, r"exclude must lie in \[-1, 7\), .* from 0 to 7"),
        (torch.tensor([0, -2, 1]), ValueError, r"exclude must lie in \[-1, 7\), .* from -2 to 1"),
        (torch.tensor([0, 1]), ValueError, r"exclude must be \[R\] = \[3\], got shape \(2,\)"),
        (torch.tensor(1), ValueError, r"exclude must be \[R\] = \[3\], got shape \(\)"),
        (torch.zeros(B, 1).long(), ValueError, r"exclude must be \[R\] = \[3\], got shape \(3, 1\)"),
        (torch.zeros(B), TypeError, "exclude must be an int64 tensor, got torch.float32"),
        (torch.zeros(B).int(), TypeError, "exclude must be an int64 tensor, got torch.int32"),
        (torch.zeros(B).bool(), TypeError, "exclude must be an int64 tensor, got torch.bool"),
        ([0, 1, 2], TypeError, "exclude must be an int64 tensor, got list"),
    ],
)
def test_exclude(exclude, error, match):
    refuses("queue_logsumexp", {"exclude": exclude}, error, match)


# --------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("which", ["q", "k", "queue", "tau", "tau_t", "exclude"])
def test_devices(which, loss):
    used = {
        "relation_loss": ["q", "k", "queue", "tau", "tau_t"],
        "info_nce": ["q", "k", "queue", "tau"],
        "queue_logsumexp": ["q", "queue", "tau", "exclude"],
    }[loss]
    if which not in used:
        return
    arguments = good() | {"tau": torch.tensor(0.1), "tau_t": torch.tensor(0.04)}
    arguments["exclude"] = torch.zeros(B, dtype=torch.int64)
    match = f"^{argument('queue' if which == 'q' else which, loss)} is on "
    refuses(loss, {which: arguments[which].to("meta")}, RuntimeError, match)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("which", ["q", "queue"])
def test_sparse(which, loss):
    arguments = good()
    arguments[which] = arguments[which].to_sparse()
    with pytest.raises(
        TypeError, match=f"{argument(which, loss)} must be a dense tensor, got torch.sparse_coo"
    ):
        CALLS[loss](arguments)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numbers_of_numpy_are_temperatures(kind, loss):
    arguments = good()
    found, expected = (CALLS[loss](arguments | {"tau": tau}) for tau in (kind(2), 2.0))
    assert torch.equal(found, expected)
    refuses(loss, {"tau": kind(-1)}, ValueError, f"{argument('tau', loss)} must be positive and finite")


def test_assignments_are_named_by_their_own_shape():
    with pytest.raises(ValueError, match=r"p1 must be \[N, M\], got shape \(3,\)"):
        cluster_contrast(torch.ones(3), torch.ones(3))


# ---------------------------------------------------------------------------------- FeatureQueue


@pytest.mark.parametrize(
    ("keys", "error", "match"),
    [
        (torch.ones(B, D).long(), TypeError, "keys must be a floating-point tensor, got torch.int64"),
        ([[1.0] * D], TypeError, "keys must be a floating-point tensor, got list"),
        (torch.ones(B, D).to_sparse(), TypeError, "keys must be a dense tensor, got torch.sparse_coo"),
        (torch.ones(B, D + 1), ValueError, r"keys must be \[B, 8\] with B ≥ 1, got shape \(3, 9\)"),
        (torch.ones(D), ValueError, r"keys must be \[B, 8\] with B ≥ 1, got shape \(8,\)"),
        (torch.ones(2, B, D), ValueError, r"keys must be \[B, 8\] .* got shape \(2, 3, 8\)"),
        (torch.ones(0, D), ValueError, r"keys must be \[B, 8\] with B ≥ 1, got shape \(0, 8\)"),
        (torch.ones(B, D, device="meta"), RuntimeError, "keys is on meta, but the queue on cpu"),
    ],
)
def test_enqueue(keys, error, match):
    queue = FeatureQueue(K, D)
    queue.enqueue(unit(2, D))
    before = {name: t.clone() for name, t in queue.state_dict().items()}
    with pytest.raises(error, match=match):
        queue.enqueue(keys)
    assert all(torch.equal(t, before[name]) for name, t in queue.state_dict().items())
    queue.enqueue(unit(2, D))
    assert (int(queue.pointer), int(queue.count)) == (4, 4)


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        (None, ValueError, "ids must be given: the queue keeps them"),
        ([1, 2, 3], TypeError, "ids must be an int64 tensor, got list"),
        (torch.arange(B).int(), TypeError, "ids must be an int64 tensor, got torch.int32"),
        (torch.arange(B).float(), TypeError, "ids must be an int64 tensor, got torch.float32"),
        (torch.arange(B).to_sparse(), TypeError, "ids must be a dense tensor, got torch.sparse_coo"),
        (torch.arange(B - 1), ValueError, r"ids must be \[B\] = \[3\], got shape \(2,\)"),
        (torch.arange(B)[:, None], ValueError, r"ids must be \[B\] = \[3\], got shape \(3, 1\)"),
        (torch.arange(B, device="meta"), RuntimeError, "ids is on meta, but keys on cpu"),
    ],
)
def test_enqueue_with_ids(ids, error, match):
    queue = FeatureQueue(K, D, ids=True)
    before = {name: t.clone() for name, t in queue.state_dict().items()}
    with pytest.raises(error, match=match):
        queue.enqueue(torch.ones(B, D), ids)
    assert all(torch.equal(t, before[name]) for name, t in queue.state_dict().items())


def test_enqueue_with_ids_into_a_queue_without():
    with pytest.raises(ValueError, match="ids must be None: the queue keeps none"):
        FeatureQueue(K, D).enqueue(torch.ones(B, D), torch.arange(B))


@pytest.mark.parametrize("native", [True, False])
def test_enqueue_of_the_queues_own_memory(native, monkeypatch):
    queue = FeatureQueue(K, D, ids=True)
    if not native:
        monkeypatch.setattr(cpu, "_cpu", None)
    before = {name: t.clone() for name, t in queue.state_dict().items()}
    for keys, ids in (
        (queue.rows[1:4], torch.arange(3)),
        (queue.rows[-1:].expand(3, D), torch.arange(3)),
        (torch.ones(3, D), queue.ids[-3:]),
    ):
        with pytest.raises(RuntimeError, match="keys or ids share memory with the queue: pass a clone"):
            queue.enqueue(keys, ids)
        assert all(torch.equal(t, before[name]) for name, t in queue.state_dict().items())
    queue.enqueue(queue.rows[1:4].clone(), torch.arange(3))


def test_feature_queue_options():
    with pytest.raises(ValueError, match="start must be one of random, zeros, empty; got 'ones'"):
        FeatureQueue(K, D, start="ones")
    with pytest.raises(TypeError, match="ids must be True or False, got Tensor"):
        FeatureQueue(K, D, ids=torch.arange(K))
    with pytest.raises(TypeError, match="size, dim and seed must be integers, got 7, 8 and '1'"):
        FeatureQueue(K, D, seed="1")


@pytest.mark.parametrize(("size", "dim"), [(0, D), (K, 0), (-1, D)])
def test_empty_feature_queue(size, dim):
    with pytest.raises(ValueError, match=f"size and dim must be at least 1, got {size} and {dim}"):
        FeatureQueue(size, dim)


@pytest.mark.parametrize(("size", "dim"), [(1.5, D), (K, 8.0), ("7", D), (None, D)])
def test_feature_queue_size_is_an_integer(size, dim):
    with pytest.raises(TypeError, match=f"size, dim and seed must be integers, got {size!r}, {dim!r} and 0"):
        FeatureQueue(size, dim)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, "float32"])
def test_feature_queue_dtype(dtype):
    with pytest.raises(TypeError, match=f"dtype must be float32, bfloat16, .* got {dtype!r}"):
        FeatureQueue(K, D, dtype=dtype)


def test_feature_queue_of_another_width():
    refuses("relation_loss", {"queue": FeatureQueue(K, D + 1)}, ValueError, "queue has rows of width 9")
