"""Tests values and all gradients of the losses against the float64 oracle, within its error budget."""

import math

import pytest
import torch
from checks import (
    BACKENDS,
    INTERPRETED,
    backends_of,
    batch,
    check_clusters,
    check_info_nce,
    check_logsumexp,
    check_nt_xent,
    check_relation,
    check_weight,
    every,
    reduced,
    slow_if_interpreted,
    to_device,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import relation, unit

from relssl.backends import tiles
from relssl.functional import info_nce as our_info_nce
from relssl.functional import queue_logsumexp, relation_loss

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = ["chunked", "reference"]  # those that support float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# Views, B, K, D. Every pair of special values of two sizes occurs: one row, a prime number of
# them; one queue row, a prime, more than a tile; a width below, off, at and above powers of two. Triton's
# interpreter takes a dozen seconds for 257 rows; 67 are more than its tile, too.
SHAPES = [
    (None, 1, 1, 8),
    (None, 1, 17, 512),
    (None, 3, 1, 130),
    (None, 3, 1000, 96),
    (None, 67, 300, 8),
    (None, 257, 17, 130),
    (None, 257, 1000, 8),
    (2, 3, 17, 96),
    (3, 1, 1000, 130),
]


def shapes(*given):
    cases = [pytest.param(s, marks=[pytest.mark.slow] * (INTERPRETED and s[1] == 257)) for s in given]
    return pytest.mark.parametrize("shape", cases, ids=str)


# The published size and one row more than it: several tiles, the last of a single row.
LARGE = (None, 3, 65537, 40)


# ------------------------------------------------------------------------------------ the grid


@pytest.mark.parametrize("form", ["kl", "ce"])
@shapes(*SHAPES)
@every(*DTYPES)
def test_relation(dtype, shape, form, backend):
    check_relation(*batch(*shape, dtype), 0.1, 0.04, form, backend)


@shapes(*SHAPES)
@every(*DTYPES)
def test_info_nce(dtype, shape, backend):
    check_info_nce(*batch(*shape, dtype), 0.2, backend)


# N, K, D. The similarities of 2 x 129 rows exceed a tile of "chunked", and of 2 x 257 what "cpu" keeps.
PAIRS = [(1, 0, 8), (1, 1, 130), (3, 17, 96), (17, 0, 130), (40, 300, 24), (129, 0, 8), (257, 0, 16)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [slow_if_interpreted(s) if s[0] > 100 else s for s in PAIRS], ids=str)
@every(*DTYPES)
def test_nt_xent(dtype, shape, reduction, backend, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_CPU", 2**16)
    count, size, dim = shape
    queue = unit(size, dim, dtype=dtype) if size else None
    check_nt_xent(
        unit(count, dim, dtype=dtype), unit(count, dim, dtype=dtype), queue, 0.3, backend, reduction
    )


# N, M: one image, one cluster; SACC's; more than "cpu" computes without its kernels.
ASSIGNMENTS = [(1, 1), (1, 3), (5, 2), (200, 10), (130, 33), (70, 67)]


@pytest.mark.parametrize("penalize", [False, True], ids=["contrast", "loss"])
@pytest.mark.parametrize("shape", ASSIGNMENTS, ids=str)
@every(*DTYPES)
def test_clusters(dtype, shape, penalize, backend):
    p1, p2 = (torch.randn(shape).mul_(2).softmax(1).to(dtype) for _ in range(2))
    for tau in (1.0, 0.1):
        check_clusters(p1, p2, tau, penalize, backend)


@shapes(*(s for s in SHAPES if s[0] is None))
@every(*DTYPES)
def test_logsumexp(dtype, shape, backend):
    x, _, queue = batch(*shape, dtype)
    check_logsumexp(x, queue, 0.1, backend)


@pytest.mark.parametrize("shape", [slow_if_interpreted(LARGE)], ids=str)
@every(*DTYPES)
def test_large_queue(dtype, backend, shape, monkeypatch):
    if INTERPRETED:  # A tile takes it milliseconds: 17 of them instead of 257.
        from relssl.kernels import heuristics

        monkeypatch.setattr(heuristics, "INTERPRETED", heuristics.Tiles(16, 4096, 4, 1))
    q, k, queue = batch(*shape, dtype)
    check_relation(q, k, queue, 0.1, 0.04, "kl", backend)
    check_logsumexp(q, queue, 0.1, backend)
    check_info_nce(q, k, queue, 0.2, backend)


@backends_of(*BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("views", [None, 2])
def test_reductions(views, reduction, backend):
    inputs = batch(views, 5, 33, 24, torch.float32)
    check_relation(*inputs, 0.1, 0.04, "kl", backend, reduction=reduction)
    check_relation(*inputs, 0.1, 0.04, "ce", backend, reduction=reduction)
    check_info_nce(*inputs, 0.2, backend, reduction=reduction)


# Triton adds up 1,024 losses at a time; its interpreter would take minutes for more (test_triton.py).
@shapes((2, 5, 33, 24), *[(None, 5, 33, 24), (None, 1030, 3, 8)] * (not INTERPRETED))
@every(*DTYPES)
def test_sums_of_rows_and_their_gradients(dtype, shape, backend):
    if backend != "reference":  # which autograd differentiates
        check_weight(*batch(*shape, dtype), backend)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("views", [None, 2])
def test_teacher_entropy(views, reduction, backend):
    q, k, queue = batch(views, 5, 333, 24, torch.float64)
    q.requires_grad_()
    loss, entropy = relation_loss(q, k, queue, reduction=reduction, return_entropy=True, backend=backend)
    rows, expected = relation(q, k, queue, 0.1, 0.04, "kl")
    torch.testing.assert_close(loss, reduced(rows, reduction), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entropy, reduced(expected, reduction), rtol=1e-10, atol=1e-10)
    assert not entropy.requires_grad


# --------------------------------------------------------------------------------- identities


@every(*DTYPES)
def test_equal_sides_have_zero_divergence(dtype, backend):
    q, _, queue = to_device(backend, *batch(None, 7, 1000, 64, dtype))
    leaf = q.clone().requires_grad_()
    loss = relation_loss(
        leaf, q, queue, student_temperature=0.1, teacher_temperature=0.1,
        reduction="none", backend=backend,
    )  # fmt: skip
    loss.sum().backward()
    # Rounding of the accumulator alone; logits reach 10, and log K = 7.
    eps = torch.finfo(loss.dtype).eps
    assert loss.abs().max() <= 64 * eps
    assert leaf.grad.abs().max() <= 64 * eps / 0.1


@pytest.mark.parametrize("backend", EXACT)
def test_cross_entropy_is_divergence_plus_entropy(backend):
    q, k, queue = batch(2, 5, 1000, 64, torch.float64)
    kl, entropy = relation_loss(q, k, queue, reduction="none", return_entropy=True, backend=backend)
    ce = relation_loss(q, k, queue, form="ce", reduction="none", backend=backend)
    torch.testing.assert_close(ce - kl, entropy.expand_as(ce), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("form", ["kl", "ce"])
def test_views_equal_separate_calls(form, backend):
    q, k, queue = (t.requires_grad_() for t in batch(3, 5, 1000, 64, torch.float64))
    weights = torch.randn(3, 5, dtype=torch.float64)

    def grads(loss):
        return torch.autograd.grad((loss * weights).sum(), (q, k, queue))

    settings = {"form": form, "reduction": "none", "backend": backend}
    together = relation_loss(q, k, queue, **settings)
    apart = torch.stack([relation_loss(view, k, queue, **settings) for view in q])
    torch.testing.assert_close(together, apart, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grads(together), grads(apart), rtol=1e-11, atol=1e-11)


# ----------------------------------------------------------------------- awkward queues and strides


@backends_of(*BACKENDS)
def test_duplicated_queue_rows(backend):
    q, k, queue = batch(None, 5, 40, 96, torch.float32)
    queue = queue[torch.arange(200) % 40]
    check_relation(q, k, queue, 0.1, 0.04, "kl", backend)
    check_info_nce(q, k, queue, 0.2, backend)
    check_logsumexp(q, queue, 0.1, backend)


@every(*DTYPES)
def test_near_duplicate_of_a_key_in_the_queue(dtype, backend):
    # The teacher's softmax is then nearly one-hot, and grad_k a small difference of large terms.
    q, k, queue = batch(None, 5, 1000, 96, torch.float64)
    queue[17] = torch.nn.functional.normalize(k[2] + 1e-3 * torch.randn(96), dim=0)
    q, k, queue = (t.to(dtype) for t in (q, k, queue))
    check_relation(q, k, queue, 0.1, 0.04, "kl", backend)
    check_relation(q, k, queue, 0.1, 0.04, "ce", backend)
    check_logsumexp(k, queue, 0.04, backend)


def transposed(t):
    return t.mT.contiguous().mT


def sliced(t):
    """Returns every second column and row of a larger tensor."""
    larger = t.new_full([2 * n for n in t.shape], torch.nan)
    view = larger[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def expanded(t):
    """Returns one row in place of all, with stride 0."""
    return t[..., :1, :].expand_as(t)


def far_apart(t):
    """Returns rows 2**29 elements apart: from the fifth on, offsets exceed 32 bits. Few pages are touched."""
    store = t.new_empty(2**29 * (len(t) - 1) + t.shape[1])
    return store.as_strided(t.shape, (2**29, 1)).copy_(t)


@pytest.mark.parametrize("layout", [transposed, sliced, slow_if_interpreted(expanded)])
@every(torch.float32, torch.bfloat16)
def test_strides(dtype, layout, backend):
    for which in range(3):
        inputs = to_device(backend, *batch(None, 6, 300, 40, dtype))
        inputs[which] = layout(inputs[which])
        check_relation(*inputs, 0.1, 0.04, "kl", backend)
        check_info_nce(*inputs, 0.2, backend)
        check_logsumexp(inputs[0], inputs[2], 0.1, backend)
    q, k, queue = to_device(backend, *batch(2, 6, 300, 40, dtype))
    check_relation(layout(q), k, queue, 0.1, 0.04, "kl", backend)


@every(torch.bfloat16, torch.float16)
@pytest.mark.parametrize("which", range(3), ids=["q", "k", "queue"])
def test_row_offsets_beyond_32_bits(which, dtype, backend):
    inputs = to_device(backend, *batch(None, 6, 6, 40, dtype))
    inputs[which] = far_apart(inputs[which])
    check_relation(*inputs, 0.1, 0.04, "kl", backend)
    check_info_nce(*inputs, 0.2, backend)


# -------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize(
    ("tau_s", "tau_t", "norm"),
    [
        (0.005, 0.005, 1.0),  # logits of 200: exp overflows float32 unless the maximum is subtracted
        (0.1, 0.04, 100.0),  # logits of 250,000: one-hot teachers
        (0.005, 0.005, 100.0),
        (1e4, 1e4, 1.0),  # uniform
        (0.005, 50.0, 1.0),  # opposite extremes
    ],
)
@every(torch.float32, torch.bfloat16, torch.float64)
def test_extreme_temperatures_and_norms(dtype, tau_s, tau_t, norm, backend):
    inputs = batch(None, 7, 1000, 96, dtype, norm)
    check_relation(*inputs, tau_s, tau_t, "kl", backend)
    check_relation(*inputs, tau_s, tau_t, "ce", backend)
    check_info_nce(*inputs, tau_s, backend)
    check_logsumexp(inputs[0], inputs[2], tau_t, backend)


@backends_of(*BACKENDS)
@pytest.mark.parametrize("size", [1, 33, slow_if_interpreted(9000)])  # one row, one tile, two tiles
def test_all_logits_equal(size, backend):
    q, k, queue = batch(None, 4, 1, 64, torch.float32)
    queue = queue.repeat(size, 1)
    check_relation(q, k, queue, 0.1, 0.04, "kl", backend)
    check_relation(q, k, queue, 0.1, 0.04, "ce", backend)
    check_logsumexp(q, queue, 0.1, backend)
    q, queue = to_device(backend, q, queue)
    lse, mean = queue_logsumexp(q, queue, 0.1, backend=backend)
    torch.testing.assert_close(lse, q @ queue[0] / 0.1 + math.log(size))
    torch.testing.assert_close(mean, queue[:1].expand(4, -1))


@backends_of(*BACKENDS)
def test_logits_below_all_floats(backend):
    """Their log-sum-exp is that of rows that exclude all of the queue, whose loss is 0."""
    rows, queue = to_device(backend, torch.full((3, 16), 1e25), torch.full((40, 16), -1e25))
    assert relation_loss(rows, rows, queue, backend=backend).isnan()


@backends_of(*BACKENDS)
@pytest.mark.parametrize("place", [slow_if_interpreted(n) for n in (0, 8999)])  # in the first tile, the last
def test_one_huge_logit(place, backend):
    q, k, queue = batch(None, 4, 9000, 64, torch.float32)
    queue[place] = q[1] * 1e4
    check_relation(q, k, queue, 0.1, 0.04, "kl", backend)
    check_relation(q, k, queue, 0.1, 0.04, "ce", backend)
    check_info_nce(q, k, queue, 0.2, backend)
    check_logsumexp(q, queue, 0.1, backend)


@backends_of(*BACKENDS)
def test_ties_among_large_logits(backend):
    # Logits of exactly +-512, each several times: eager's softmax subtracts the maximum and happens to be
    # exact, while exp(logit - lse) would have the rounding of an lse of 512.
    q, k, queue = batch(None, 1, 5, 1, torch.float32, norm=2.0)
    check_relation(q, k, queue, 1 / 128, 1.0, "kl", backend)


# --------------------------------------------------------------------------------------- exclude


@every(*DTYPES)
def test_exclude(dtype, backend):
    # -1 leaves out nothing; first and last row; one row that two queries leave out.
    exclude = torch.tensor([-1, 0, 299, 7, 7])
    x, _, queue = batch(None, 5, 300, 40, dtype)
    check_logsumexp(x, queue, 0.1, backend, exclude)


@every(torch.float32, torch.float64)
# All of the last tile is one row, and it is excluded: for each power of two a tile may be wide.
@pytest.mark.parametrize("size", [129, 257, 513, 1025, 2049, 4097, 8193, 16385, slow_if_interpreted(65537)])
def test_exclude_all_of_a_tile(size, dtype, backend):
    x, _, queue = batch(None, 2, size, 8, dtype)
    check_logsumexp(x, queue, 0.1, backend, torch.tensor([size - 1, -1]))


@backends_of(*BACKENDS)
def test_exclude_own_row(backend):
    # The diagonal of NT-Xent: a batch against itself.
    x = unit(257, 64)
    check_logsumexp(x, x.clone(), 0.5, backend, torch.arange(257))


@backends_of(*BACKENDS)
def test_empty_row(backend):
    inputs = to_device(backend, unit(3, 8), unit(1, 8), torch.tensor(0.1))
    x, queue, tau = (t.requires_grad_() for t in inputs)
    exclude = to_device(backend, torch.tensor([0, -1, 0]))
    lse, mean = queue_logsumexp(x, queue, tau, exclude=exclude, backend=backend)
    assert lse[0] == lse[2] == -torch.inf
    torch.testing.assert_close(lse[1], x[1] @ queue[0] / tau)
    assert not mean[::2].any()
    torch.testing.assert_close(mean[1], queue[0])
    for output in (lse.exp(), mean, lse[1]):  # exp: an empty row's weight in logaddexp
        grads = torch.autograd.grad(
            (output * torch.rand_like(output)).sum(), (x, queue, tau), retain_graph=True
        )
        assert all(torch.isfinite(g).all() for g in grads)
        assert not grads[0][::2].any()


# ------------------------------------------------------------------------------------ NaN and Inf


def losses(q, k, queue, backend):
    settings = {"reduction": "none", "backend": backend}
    return {
        "kl": relation_loss(q, k, queue, **settings),
        "ce": relation_loss(q, k, queue, form="ce", **settings),
        "info_nce": our_info_nce(q, k, queue, **settings),
        "lse": queue_logsumexp(q, queue, 0.1, backend=backend)[0],
    }


@backends_of(*BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("grad", [False, True])
def test_nonfinite_row_affects_its_own_loss_only(grad, side, bad, backend):
    q, k, queue = to_device(backend, *batch(None, 5, 300, 40, torch.float32))
    clean = losses(q, k, queue, backend)
    {"q": q, "k": k}[side][2, 3] = bad
    q.requires_grad_(grad)
    others = torch.arange(5) != 2
    for name, loss in losses(q, k, queue, backend).items():
        if name == "lse" and (side == "k" or bad != torch.nan):
            continue  # no teacher; and lse is not a loss: it may be infinite
        assert loss[2].isnan(), f"{name}: {loss[2]}"
        torch.testing.assert_close(loss[others].detach(), clean[name][others])


@backends_of(*BACKENDS)
# In the first and in the last of several tiles.
@pytest.mark.parametrize("place", [0, slow_if_interpreted(8999)])
@pytest.mark.parametrize("grad", [False, True])
def test_nan_in_the_queue_affects_every_loss(grad, place, backend):
    q, k, queue = to_device(backend, *batch(None, 3, 9000, 40, torch.float32))
    queue[place, 5] = torch.nan
    q.requires_grad_(grad)
    for name, loss in losses(q, k, queue, backend).items():
        assert loss.isnan().all(), name


# ------------------------------------------------------------------------------------- any input


@backends_of("cpu", "chunked")
@settings(max_examples=100, deadline=None, derandomize=True)  # make fuzz draws anew
@given(
    views=st.sampled_from([None, 1, 2]),
    rows=st.integers(1, 9),
    size=st.one_of(st.integers(1, 70), st.integers(2046, 2051)),  # around the widest tile, too
    dim=st.integers(2, 40),  # not 1, where BLAS sums a tile's terms one after another; see docs/results.md
    taus=st.tuples(*2 * [st.floats(0.005, 10)]),
    norm=st.floats(0.01, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    form=st.sampled_from(["kl", "ce"]),
    seed=st.integers(0, 2**16),
)
def test_drawn_inputs(views, rows, size, dim, taus, norm, dtype, form, seed, backend):
    torch.manual_seed(seed)
    q, k, queue = batch(views, rows, size, dim, dtype, norm)
    check_relation(q, k, queue, *taus, form, backend, drawn=True)
    check_info_nce(q, k, queue, taus[0], backend, drawn=True)
    exclude = torch.randint(-1, size, (rows,)) if size > 1 else None
    check_logsumexp(k, queue, taus[1], backend, exclude, drawn=True)
