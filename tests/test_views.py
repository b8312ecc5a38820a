"""NT-Xent, the cluster loss and the entropy, against the published formulas written out in float64."""

import math

import pytest
import torch
from oracle import unit

import relssl
from relssl.functional import (
    cluster_contrast,
    cluster_entropy,
    cluster_entropy_penalty,
    cluster_loss,
    nt_xent,
)

EXACT = ["chunked", "reference"]  # Those that accept float64.
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def published_nt_xent(z1, z2, tau, queue=None):
    """Computes, row by row, the cross-entropy of the positive among all other rows."""
    z, rows = torch.cat((z1, z2)), []
    count = len(z1)
    for i in range(2 * count):
        positive = (i + count) % (2 * count)
        negatives = [j for j in range(2 * count) if j not in (i, positive)]
        logits = [z[i] @ z[positive], *(z[i] @ z[j] for j in negatives)]
        logits = torch.stack(logits) / tau
        if queue is not None:
            logits = torch.cat((logits, queue @ z[i] / tau))
        rows.append(torch.nn.functional.cross_entropy(logits[None], torch.zeros(1, dtype=torch.long)))
    return torch.stack(rows)


def published_cluster(p1, p2, tau):
    """Computes NT-Xent over the columns, and log M - H(P) of each view."""
    columns = [torch.stack([c / c.square().sum().sqrt() for c in p.unbind(1)]) for p in (p1, p2)]
    loss = published_nt_xent(*columns, tau).mean()
    for p in (p1, p2):
        share = p.sum(0) / p.sum()
        loss = loss + math.log(p.shape[1]) + (share * share.log()).sum()
    return loss


def assignments(count, clusters, dtype=torch.float64):
    return torch.randn(count, clusters, dtype=dtype).softmax(1)


def with_gradients(loss, *inputs):
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = loss(*leaves)
    g = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view(value.shape).to(value.dtype)
    return value.detach(), *torch.autograd.grad(value, leaves, g)


# One image; few; more than a tile of rows. A queue of one row, and of several tiles.
@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("size", [None, 1, 300])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_nt_xent(count, size, backend):
    z1, z2 = unit(count, 24, dtype=torch.float64), unit(count, 24, dtype=torch.float64)
    queues = [] if size is None else [unit(size, 24, dtype=torch.float64)]
    tau = torch.tensor(0.5, dtype=torch.float64)
    ours = with_gradients(
        lambda z1, z2, tau, *queues: nt_xent(
            z1, z2, temperature=tau, queue=queues[0] if queues else None, reduction="none", backend=backend
        ),
        z1, z2, tau, *queues,
    )  # fmt: skip
    for got, want in zip(ours, with_gradients(published_nt_xent, z1, z2, tau, *queues), strict=True):
        torch.testing.assert_close(got, want, **TIGHT)


@pytest.mark.parametrize(("reduction", "reduce"), [("mean", torch.mean), ("sum", torch.sum)])
def test_reductions(reduction, reduce):
    z1, z2 = unit(5, 8, dtype=torch.float64), unit(5, 8, dtype=torch.float64)
    torch.testing.assert_close(
        nt_xent(z1, z2, reduction=reduction), reduce(published_nt_xent(z1, z2, 0.5)), **TIGHT
    )


@pytest.mark.parametrize(("dtype", "loose"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_nt_xent_in_other_dtypes(dtype, loose):
    """Checks every gradient of the C++ kernels, down to temperatures whose exponents exceed float32."""
    for tau in (0.5, 0.005):
        z1, z2, queue = (unit(n, 128, dtype=dtype) for n in (33, 33, 500))
        ours = with_gradients(lambda *t, tau=tau: nt_xent(*t[:2], temperature=tau, queue=t[2]), z1, z2, queue)
        exact = (t.double() for t in (z1, z2, queue))
        wanted = with_gradients(lambda a, b, c, tau=tau: published_nt_xent(a, b, tau, c).mean(), *exact)
        for got, want in zip(ours, wanted, strict=True):
            scale = want.abs().max() + 1 / tau / 66  # The gradient of a mean over 66 rows.
            assert (got.double() - want).abs().max() <= loose * scale


@pytest.mark.parametrize(("count", "clusters"), [(1, 2), (12, 3), (40, 10)])
def test_cluster_loss(count, clusters):
    p1, p2 = assignments(count, clusters), assignments(count, clusters)
    loss = relssl.nn.ClusterLoss(temperature=0.7)
    wanted = with_gradients(lambda a, b: published_cluster(a, b, 0.7), p1, p2)
    for got, want in zip(with_gradients(loss, p1, p2), wanted, strict=True):
        torch.testing.assert_close(got, want, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_empty_clusters(dtype):
    """Clusters 1 and 3 have no image, since logits underflow: value and gradient must be finite."""
    logits = torch.randn(20, 4).to(dtype)
    logits[:, [1, 3]] = -1e4
    logits.requires_grad_()
    p = logits.softmax(1)
    assert (p[:, 1] == 0).all()
    value = cluster_loss(p, p.roll(1, 0))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all()
    halves = cluster_entropy_penalty(torch.tensor([[0.5, 0, 0.5, 0]]))
    assert halves == pytest.approx(math.log(2))


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_gradients_of_empty_clusters(backend):
    """They are those of eager code: the logarithm of the least share, and NT-Xent's for cosines of 0."""
    p = torch.rand(20, 4)
    p[:, [1, 3]] = 0
    found = []
    for name in (backend, "reference"):
        leaf = p.clone().requires_grad_()
        loss = cluster_loss(leaf, leaf.flip(0).roll(1, 1), backend=name)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[0][1].isfinite().all() and (found[0][1][:, 1] < -4).all()


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_assignments_of_zeros(backend):
    """They have no shares: the penalty is NaN, and the contrast of cosines 0 is log(2M - 1)."""
    zeros = torch.zeros(5, 4, requires_grad=True)
    assert cluster_entropy_penalty(zeros).isnan() and cluster_loss(zeros, zeros, backend=backend).isnan()
    contrast = cluster_contrast(zeros, zeros, backend=backend)
    assert contrast.item() == pytest.approx(math.log(7))
    assert not torch.autograd.grad(contrast, zeros)[0].any()


def test_the_cluster_loss_is_the_sum_of_its_parts():
    p1, p2 = (assignments(30, 7, torch.float32) for _ in range(2))
    penalties = cluster_entropy_penalty(p1) + cluster_entropy_penalty(p2)
    whole = cluster_loss(p1, p2, temperature=0.5)
    torch.testing.assert_close(whole, cluster_contrast(p1, p2, temperature=0.5) + penalties)
    with pytest.raises(ValueError, match="p2 must have the shape of p1"):
        cluster_loss(p1, p2[1:])


def test_equal_clusters_have_no_penalty():
    assert float(cluster_entropy_penalty(torch.full((6, 5), 0.2))) == pytest.approx(0, abs=1e-6)


def test_enqueueing_before_backward():
    z1, z2, keys = unit(4, 16), unit(4, 16), unit(4, 16)
    queue = relssl.FeatureQueue(32, 16)
    before = queue.rows.clone()
    z1.requires_grad_()
    loss = relssl.nn.NTXentLoss(temperature=0.3)(z1, z2, queue)
    queue.enqueue(keys)
    (got,) = torch.autograd.grad(loss, z1)
    (want,) = torch.autograd.grad(nt_xent(z1, z2, temperature=0.3, queue=before), z1)
    assert not torch.equal(before, queue.rows)
    torch.testing.assert_close(got, want)


def test_learned_temperature():
    loss = relssl.nn.NTXentLoss(temperature=torch.nn.Parameter(torch.tensor(0.5)))
    loss(unit(4, 16), unit(4, 16)).backward()
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    assert loss.temperature.grad.isfinite()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(3, 8), torch.ones(4, 8)), {}, ValueError, "z2 must have the shape of z1"),
        ((torch.ones(3, 8), torch.ones(3, 8).int()), {}, TypeError, "z2 must be float32, .*got torch.int32"),
        ((torch.ones(3), torch.ones(3)), {}, ValueError, r"z1 must be \[N, D\]"),
        ((torch.ones(3, 8), torch.ones(3, 8)), {"queue": torch.ones(5, 9)}, ValueError, "width 9, but z1"),
        (
            (torch.ones(3, 8), torch.ones(3, 8)),
            {"temperature": 0.0},
            ValueError,
            "temperature must be positive",
        ),
        ((torch.ones(3, 8), torch.ones(3, 8)), {"reduction": "all"}, ValueError, "reduction must be one of"),
        ((torch.ones(3, 8), torch.ones(3, 8)), {"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        nt_xent(*arguments, **options)


def test_bad_assignments():
    with pytest.raises(ValueError, match="p2 must have the shape of p1"):
        cluster_contrast(torch.ones(3, 8), torch.ones(3, 7))
    with pytest.raises(TypeError, match="p must be float32"):
        cluster_entropy_penalty(torch.ones(3, 8, dtype=torch.int64))


def test_the_old_name_of_the_penalty_warns():
    p = torch.rand(6, 5)
    with pytest.warns(DeprecationWarning, match="cluster_entropy_penalty"):
        assert torch.equal(cluster_entropy(p), cluster_entropy_penalty(p))
